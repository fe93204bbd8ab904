"""The whole chain on one machine: raw media -> Spark -> shards -> two training runs -> MLflow registry -> generated clips.

Runs the same commands that one types by hand, one after the other, and shows each. A stage that has finished is not run again: an
interrupted demo goes on where it was.
"""

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

from streaming import LocalDataset

from model import command, config
from model.data.schema import Kind, Manifest
from model.errors import UserError
from pipelines.chain import MODULE, Progress, Stage, alone_in, trainer

TRAINING = ("yamls/demo/stage1.yaml", "yamls/demo/stage2.yaml")


@dataclass(frozen=True)
class DemoConfig:
    """The demo."""

    data: str | None = None  # folder of own videos and images with captions; None: made-up scenes
    folder: str = "runs/demo"  # own data get a folder of their own beside it
    processes: int = 2  # of training
    prompts: tuple[str, ...] = ()  # for the made-up scenes; own data are sampled with their own captions
    overrides: tuple[str, ...] = ()  # key=value for both training runs

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise ValueError(f"processes must be at least 1, got {self.processes}")
        if self.data is None and not any(prompt.strip() for prompt in self.prompts):
            raise ValueError(f"prompts must name at least one, got {list(self.prompts)}")


def demo(c: DemoConfig) -> None:
    """Run what is missing and print where everything is.

    Raises:
        UserError: no such data folder, overrides that training would refuse, a demo at work in the same folder, or a stage that
            failed.
    """
    if c.data is not None and not Path(c.data).is_dir():
        raise UserError(f"data: no such folder: {c.data}")
    if c.overrides:  # told now, not after the data are prepared
        from model.train import TrainConfig  # seconds of imports, which only overrides are worth

        for yaml in TRAINING:
            config.load(TrainConfig, yaml, c.overrides)
    folder = Path(c.folder if c.data is None else f"{c.folder}-{_fingerprint(Path(c.data))}")
    folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder):
        _run_stages(c, folder)


def _run_stages(c: DemoConfig, folder: Path) -> None:
    begin = time.monotonic()
    captions = c.prompts
    media = Stage("make sample media", (*MODULE, "dataprep.scene_files", "yamls/demo/scenes.yaml"))
    words = () if c.data is None else (f"captions={json.dumps(c.data)}",)
    inputs = () if c.data is None else (f"inputs={json.dumps([c.data])}",)
    stages = [
        *([media] if c.data is None else []),
        Stage("build a small text encoder", (*MODULE, "dataprep.small_t5", "yamls/demo/small_t5.yaml", *words)),
        Stage("prepare the data with Spark", (*MODULE, "dataprep.run", "yamls/demo/dataprep.yaml", *inputs)),
    ]
    progress = Progress(folder, len(stages) + 3, "DEMO_FOLDER")
    for stage in stages:
        progress.run(stage)

    shards = folder / "shards"
    overrides = list(c.overrides)
    if c.data is not None:
        captions = _captions(shards, 4)
        overrides += [f"samples.prompts={json.dumps(captions[:2])}"]
    for number, (yaml, batch) in enumerate(zip(TRAINING, (16, 8), strict=True), 1):
        own = _fit_to_data(shards / f"stage{number}", batch, c.processes)
        progress.run(Stage(f"train stage {number}", (*trainer(c.processes), yaml, *overrides, *own)))
    progress.run(Stage("sample", (*MODULE, "pipelines.sample", "yamls/demo/sample.yaml", f"prompts={json.dumps(captions)}")))
    print(_summary(folder, time.monotonic() - begin))


def _fingerprint(data: Path) -> str:
    """Names the work folder of own data: other files, another folder."""
    rows = sorted(f"{p.relative_to(data)} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in data.rglob("*") if p.is_file())
    if not rows:
        raise UserError(
            f"data: nothing in {data}; put videos or images there, each with a caption in a .txt file of the same name"
        )
    digest = hashlib.sha256("\n".join([str(data.resolve()), *rows]).encode()).hexdigest()
    return digest[:8]


def _counts(stage_folder: Path) -> dict[Kind, int]:
    kinds: tuple[Kind, ...] = ("videos", "images")
    return {kind: Manifest.read(stage_folder / kind).num_samples for kind in kinds if (stage_folder / kind).is_dir()}


def _fit_to_data(stage_folder: Path, batch: int, processes: int) -> list[str]:
    """Overrides for data that lack videos or images, or have fewer than a batch takes."""
    counts = _counts(stage_folder)
    overrides = [f"data.{kind}=null" for kind in ("videos", "images") if kind not in counts]
    share = batch // len(counts)
    first = next(iter(counts.values()))  # an epoch is a pass over the videos; images repeat as needed
    if first < processes:
        raise UserError(
            f"{first} clip{'s' if first != 1 else ''} in {stage_folder}: {processes} processes need at least one each"
        )
    fitting = min(share, first // processes * processes)
    return [*overrides, f"global_batch={fitting * len(counts)}"] if fitting != share or len(counts) == 1 else overrides


def _captions(shards: Path, count: int) -> tuple[str, ...]:
    """The first distinct captions of the prepared data; of one that was longer than the text encoder takes, its first words."""
    found: dict[str, None] = {}
    for kind in _counts(shards / "stage1"):
        folder = shards / "stage1" / kind
        samples, limit = LocalDataset(str(folder)), Manifest.read(folder).text.max_tokens
        for i in range(len(samples)):
            sample = samples[i]
            cut = len(sample["text"]) >= limit
            found[" ".join(sample["caption"].split()[:6]) if cut else sample["caption"]] = None
            if len(found) == count:
                return tuple(found)
    return tuple(found)


def _summary(folder: Path, seconds: float) -> str:
    samples = folder / "samples"
    clips = sorted(samples.glob("*.mp4"))
    return f"""
Done in {seconds:.0f} s.
  clips            {samples} ({len(clips)} mp4, {len(clips)} gif)
  contact sheet    {samples / "sheet.png"}
  shards           {folder / "shards"}
  models           models:/demo-stage1@demo, models:/demo-stage2@demo
  MLflow           .venv/bin/mlflow ui --backend-store-uri sqlite:///{folder / "mlflow.db"}   (losses, sample videos, registry)

Next
  other prompts    DEMO_FOLDER={folder} .venv/bin/python -m pipelines.sample yamls/demo/sample.yaml prompts='["..."]'
  train longer     make demo ARGS='overrides=["schedule.steps=3000"] folder=runs/demo-long'
  your own media   make demo DATA=path/to/folder
  the real sizes   .venv/bin/python -m pipelines.plan yamls/stage1.yaml
"""


if __name__ == "__main__":
    command.run(DemoConfig, demo, __doc__ or "", example="python -m pipelines.demo yamls/demo/demo.yaml data=path/to/folder")
