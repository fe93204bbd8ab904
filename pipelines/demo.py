"""The whole chain on one machine: raw media -> Spark -> shards -> two training runs -> MLflow registry -> generated clips.

Runs the same commands that one types by hand, one after the other, and shows each. A stage that has finished is not run again: an
interrupted demo goes on where it was.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from streaming import LocalDataset

from model import command
from model.config import UserError
from model.data.schema import Kind, Manifest


@dataclass(frozen=True)
class DemoConfig:
    """The demo."""

    data: str | None = None  # folder of own videos and images with captions; None: made-up scenes
    folder: str = "runs/demo"  # own data get a folder of their own beside it
    processes: int = 2  # of training
    prompts: tuple[str, ...] = ()  # for the made-up scenes; own data are sampled with their own captions
    overrides: tuple[str, ...] = ()  # key=value for both training runs


@dataclass(frozen=True)
class Stage:
    """One command of the demo."""

    title: str
    arguments: tuple[str, ...]


def demo(c: DemoConfig) -> None:
    """Run what is missing and print where everything is.

    Raises:
        UserError: no such data folder, or a stage that failed.
    """
    if c.data is not None and not Path(c.data).is_dir():
        raise UserError(f"data: no such folder: {c.data}")
    folder = Path(c.folder if c.data is None else f"{c.folder}-{_fingerprint(Path(c.data))}")
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    module = (sys.executable, "-m")
    captions = c.prompts
    media = Stage("make sample media", (*module, "dataprep.scene_files", "yamls/demo/scenes.yaml"))
    words = () if c.data is None else (f"captions={json.dumps(c.data)}",)
    inputs = () if c.data is None else (f"inputs={json.dumps([c.data])}",)
    stages = [
        *([media] if c.data is None else []),
        Stage("build a small text encoder", (*module, "dataprep.small_t5", "yamls/demo/small_t5.yaml", *words)),
        Stage("prepare the data with Spark", (*module, "dataprep.run", "yamls/demo/dataprep.yaml", *inputs)),
    ]
    total = len(stages) + 3
    for number, stage in enumerate(stages, 1):
        _run(stage, folder, f"{number}/{total}")

    shards = folder / "shards"
    overrides = list(c.overrides)
    if c.data is not None:
        captions = _captions(shards, 4)
        overrides += [f"samples.prompts={json.dumps(captions[:2])}"]
    trainer = (str(Path(sys.executable).with_name("composer")), "-n", str(c.processes), "model/train.py")
    for stage_number in (1, 2):
        own = _fit_to_data(shards / f"stage{stage_number}", 16 if stage_number == 1 else 8, c.processes)
        arguments = (*trainer, f"yamls/demo/stage{stage_number}.yaml", *overrides, *own)
        _run(Stage(f"train stage {stage_number}", arguments), folder, f"{total - 3 + stage_number}/{total}")
    prompts = f"prompts={json.dumps(captions)}"
    _run(Stage("sample", (*module, "pipelines.sample", "yamls/demo/sample.yaml", prompts)), folder, f"{total}/{total}")
    print(_summary(folder, time.monotonic() - begin))


def _run(stage: Stage, folder: Path, number: str) -> None:
    """Run a command unless it has finished before with the same words."""
    marker = folder / "finished" / hashlib.sha256(json.dumps(stage.arguments).encode()).hexdigest()[:16]
    if marker.exists():
        print(f"[{number}] {stage.title}: done before", flush=True)
        return
    print(f"[{number}] {stage.title}\n      {_typed(stage.arguments)}", flush=True)
    begin = time.monotonic()
    environment = {**os.environ, "DEMO_FOLDER": str(folder), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    code = subprocess.run(stage.arguments, env=environment).returncode
    if code:
        raise UserError(
            f"the demo stopped at '{stage.title}' (exit code {code}); what is done is kept, make demo goes on from there"
        )
    marker.parent.mkdir(exist_ok=True)
    marker.write_text(stage.title + "\n", encoding="utf-8")
    print(f"[{number}] {stage.title}: {time.monotonic() - begin:.0f} s\n", flush=True)


def _typed(arguments: Sequence[str]) -> str:
    """The command as one would type it."""
    words = [Path(word).name if word.startswith(sys.prefix) else word for word in arguments]
    return " ".join(f"'{word}'" if any(mark in word for mark in ' "[') else word for word in words)


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
    """The first distinct captions of the prepared data."""
    found: dict[str, None] = {}
    for kind in _counts(shards / "stage1"):
        samples = LocalDataset(str(shards / "stage1" / kind))
        for i in range(len(samples)):
            found[samples[i]["caption"]] = None
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
