"""Proof that it learns: the whole chain on the benchmark Moving Scenes, then metrics that know the truth.

Draws videos, prepares them with Spark, trains both stages, and asks the cascade for clips to captions that it has not been
trained on, a third of them combinations that it has never seen. Each command is shown; what has finished is not run again.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from model import command, config
from pipelines.chain import MODULE, Progress, Stage, alone_in, trainer

YAMLS = "yamls/learn"
TRAINING = (f"{YAMLS}/stage1.yaml", f"{YAMLS}/stage2.yaml")


@dataclass(frozen=True)
class LearnConfig:
    """How much of it."""

    folder: str = "runs/learn"
    processes: int = 2  # of training
    seen: int = 160  # held-out videos of combinations that training shows
    new: int = 80  # and of others
    media: tuple[str, ...] = ()  # key=value for the training videos
    stage1: tuple[str, ...] = ()  # for training stage 1
    stage2: tuple[str, ...] = ()
    learned: tuple[str, ...] = ()  # for the measurement

    def __post_init__(self) -> None:
        for name in ("processes", "seen", "new"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def learn(c: LearnConfig) -> None:
    """Run what is missing and print where everything is.

    Raises:
        UserError: overrides that training would refuse, another one at work in the folder, or a stage that failed.
    """
    if c.stage1 or c.stage2:  # told now, not after the data are prepared
        from model.train import TrainConfig  # seconds of imports, which only overrides are worth

        for yaml, overrides in zip(TRAINING, (c.stage1, c.stage2), strict=True):
            config.load(TrainConfig, yaml, overrides)
    folder = Path(c.folder)
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    with alone_in(folder):
        stages = _stages(c, folder)
        progress = Progress(folder, len(stages), "LEARN_FOLDER")
        for stage in stages:
            progress.run(stage)
    print(f"""
Done in {time.monotonic() - begin:.0f} s.
  results          {folder / "learned"}
  models           models:/learn-stage1@learn, models:/learn-stage2@learn
  MLflow           .venv/bin/mlflow ui --backend-store-uri sqlite:///{folder / "mlflow.db"}   (losses by noise band, samples)
""")


def _stages(c: LearnConfig, folder: Path) -> list[Stage]:
    held_out = folder / "held-out"
    scenes = (*MODULE, "dataprep.scene_files", f"{YAMLS}/scenes.yaml")
    prepare = (*MODULE, "dataprep.run", f"{YAMLS}/dataprep.yaml")
    others = ("seed=1", "num_images=0")
    inputs = ",".join(f'"{held_out / name / "webdataset"}"' for name in ("seen", "new"))
    return [
        Stage("draw videos to train on", (*scenes, *c.media)),
        Stage("draw held-out videos", (*scenes, *others, f"output={held_out / 'seen'}", f"num_videos={c.seen}")),
        Stage(
            "draw held-out videos of new combinations",
            (*scenes, *others, f"output={held_out / 'new'}", f"num_videos={c.new}", "difficulty=benchmark_unseen", "prefix=new-"),
        ),
        Stage("build a small text encoder", (*MODULE, "dataprep.small_t5", f"{YAMLS}/small_t5.yaml")),
        Stage("prepare the data with Spark", prepare),
        Stage("prepare the held-out data", (*prepare, f"inputs=[{inputs}]", f"output={held_out / 'shards'}")),
        Stage("train stage 1", (*trainer(c.processes), TRAINING[0], *c.stage1)),
        Stage("train stage 2", (*trainer(c.processes), TRAINING[1], *c.stage2)),
        Stage("draw their learning curves", (*MODULE, "pipelines.curves", f"{YAMLS}/curves.yaml")),
        Stage("measure what they have learnt", (*MODULE, "pipelines.learned", f"{YAMLS}/learned.yaml", *c.learned)),
    ]


if __name__ == "__main__":
    command.run(LearnConfig, learn, __doc__ or "", example="python -m pipelines.learn yamls/learn/learn.yaml folder=runs/learn")
