"""The paper's ablations on Moving Scenes: variants of stage 1, trained with the same compute and several seeds, and measured.

``python -m pipelines.ablations yamls/learn/ablations.yaml`` trains on the data of ``make learn``. Each run is a training and a
``pipelines.learned`` of its own, whose commands are shown; what has finished is not run again. Writes a table as JSON and as a
figure, and prints it. Start it several times at once, and they share the runs among them:

    for core in 0 1; do OMP_NUM_THREADS=1 python -m pipelines.ablations yamls/learn/ablations.yaml > $core.log 2>&1 & done; wait
"""

import json
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from model import command, config
from model.errors import UserError
from model.planning import memory_plan
from model.train import TrainConfig
from pipelines.chain import MODULE, Busy, Progress, Stage, alone_in, trainer


@dataclass(frozen=True)
class VariantConfig:
    """One line of the table."""

    name: str
    overrides: tuple[str, ...] = ()  # key=value for training
    train: str | None = None  # another yaml than the others'


@dataclass(frozen=True)
class AblationsConfig:
    """Which variants, for how long, measured how."""

    variants: tuple[VariantConfig, ...]
    train: str = "yamls/learn/ablated.yaml"
    learned: str = "yamls/learn/learned.yaml"
    folder: str = "runs/learn"  # of the data that make learn prepared
    output: str = "runs/learn/ablations"
    name: str = "ablations"  # of the files with the table
    teraflops: float = 20.0  # 10^12 operations of each training run, counted as by pipelines.plan: equal compute
    seeds: tuple[int, ...] = (0, 1, 2)
    processes: int = 1  # of each training run
    overrides: tuple[str, ...] = ()  # key=value for all training runs
    measure: tuple[str, ...] = ()  # key=value for all measurements

    def __post_init__(self) -> None:
        names = [variant.name for variant in self.variants]
        if not names or len(set(names)) < len(names) or not all(re.fullmatch(r"[\w.-]+", name) for name in names):
            raise ValueError(f"variants must have names of letters, digits, dots and dashes, each its own, got {names}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds must name at least one, each once and none negative, got {list(self.seeds)}")
        if not re.fullmatch(r"[\w-]+", self.name):
            raise ValueError(f"name must be of letters, digits and dashes, got {self.name!r}")
        if self.processes < 1 or not self.teraflops > 0:
            raise ValueError("processes must be at least 1 and teraflops above 0")


@dataclass(frozen=True)
class Measured:
    """One run."""

    variant: str
    seed: int
    steps: int
    metrics: dict[str, float]  # see METRICS


Metric = Callable[[dict[str, Any]], float]


def _share(split: str, name: str) -> Metric:
    def found(tree: dict[str, Any]) -> float:
        rate = tree[split]["stage1"]["rates"][name]
        return float(100 * rate["right"] / rate["number"])

    return found


def _error(noise: float) -> Metric:
    return lambda tree: float(next(level["error"] for level in tree["denoising"] if level["noise"] == noise))


# What of learned.json is shown, in the table's order: shares, better when larger, and errors, better when smaller.
METRICS: dict[str, Metric] = {
    "count %": _share("seen", "count"),
    "colour %": _share("seen", "colour"),
    "shape %": _share("seen", "shape"),
    "direction %": _share("seen", "direction"),
    "new: shape %": _share("new", "shape"),
    "distance": lambda tree: float(tree["seen"]["distance"]),
    "error at 0.5": _error(0.5),
    "error at 2": _error(2),
    "error at 8": _error(8),
}


def ablations(c: AblationsConfig) -> None:
    """Run what is missing, and draw.

    Raises:
        UserError: settings that a training run would refuse, no data, another one at work in the folder, or a stage that failed.
    """
    steps = {variant.name: _steps(c, variant) for variant in c.variants}  # tells now what training would refuse after hours
    if not (Path(c.folder) / "shards").is_dir():
        raise UserError(f"{c.folder}: no shards; make learn prepares them")
    output = Path(c.output)
    output.mkdir(parents=True, exist_ok=True)
    # All variants once, then again: stopped early, it has something to show.
    runs = [_Run(c, variant, seed, steps[variant.name]) for seed in c.seeds for variant in c.variants]
    for run in runs:
        known = run.is_done()
        with suppress(Busy):  # another process makes it
            run.make()
            if not known:
                _write(c, output, _measured(runs))
    found = _measured(runs)
    _write(c, output, found)
    print(_table(c, found))
    if len(found) < len(runs):
        print(f"{len(runs) - len(found)} runs are being made by other processes; the same command shows them once they are done")
    print(f"figure: {output / c.name}.png\nnumbers: {output / c.name}.json")


def _steps(c: AblationsConfig, variant: VariantConfig) -> int:
    """As many optimiser steps as the compute allows."""
    told = config.load(TrainConfig, variant.train or c.train, _training(c, variant, c.seeds[0], 1))
    # Operations do not depend on the precision, and the count is of a GPU's step.
    step = memory_plan.count(told, gpus=c.processes).computation.step * told.global_batch
    steps = int(c.teraflops * 1e12 / step)
    if steps < 1:
        raise UserError(f"{variant.name}: a step takes {step / 1e12:.2g} teraflops, more than the run's {c.teraflops:g}")
    return steps


def _training(c: AblationsConfig, variant: VariantConfig, seed: int, steps: int) -> tuple[str, ...]:
    name = f"{variant.name}-{seed}"
    own = (f"name={name}", f"seed={seed}", f"schedule.steps={steps}", f"folder={Path(c.output) / 'runs'}")
    return (*c.overrides, *variant.overrides, *own, f"publish.name=ablation-{name}")


class _Run:
    """One training and its measurement."""

    def __init__(self, c: AblationsConfig, variant: VariantConfig, seed: int, steps: int) -> None:
        self.variant, self.seed, self.steps = variant.name, seed, steps
        name = f"{variant.name}-{seed}"
        self.folder = Path(c.output) / name
        self.shared = Path(c.folder)
        measure = (f"output={self.folder}", f"cascade.stage1=models:/ablation-{name}@learn", "cascade.stage2=null", "high=null")
        training = (*trainer(c.processes), variant.train or c.train, *_training(c, variant, seed, steps))
        self.stages = (
            Stage(f"train {name}, {steps} steps", training),
            Stage(f"measure {name}", (*MODULE, "pipelines.learned", c.learned, *c.measure, *measure)),
        )

    def _progress(self) -> Progress:
        return Progress(self.folder, len(self.stages), "LEARN_FOLDER", self.shared)

    def is_done(self) -> bool:
        return self._progress().have_finished(self.stages)

    def make(self) -> None:
        """Run what has not finished.

        Raises:
            Busy: another process is at it.
            UserError: a stage failed.
        """
        self.folder.mkdir(exist_ok=True)
        with alone_in(self.folder):
            progress = self._progress()
            for stage in self.stages:
                progress.run(stage)

    def measured(self) -> Measured:
        """Of a run that is done."""
        tree = json.loads((self.folder / "learned.json").read_text(encoding="utf-8"))
        return Measured(self.variant, self.seed, self.steps, {metric: read(tree) for metric, read in METRICS.items()})


def _measured(runs: Sequence[_Run]) -> list[Measured]:
    return [run.measured() for run in runs if run.is_done()]


def _spread(found: Sequence[Measured], variant: str, metric: str) -> tuple[float, float | None]:
    """Mean and standard deviation over seeds."""
    values = [run.metrics[metric] for run in found if run.variant == variant]
    return mean(values), stdev(values) if len(values) > 1 else None


def _table(c: AblationsConfig, found: Sequence[Measured]) -> str:
    """Markdown, so that it can be pasted into the docs."""
    lines = ["| variant | steps | " + " | ".join(METRICS) + " |", "|---" * (len(METRICS) + 2) + "|"]
    steps = {run.variant: run.steps for run in found}
    for name in (variant.name for variant in c.variants if variant.name in steps):
        cells = []
        for metric in METRICS:
            middle, spread = _spread(found, name, metric)
            cells.append(_plain(middle, 3) + (f" ± {_plain(spread, 2)}" if spread is not None else ""))
        lines.append(f"| {name} | {steps[name]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _plain(value: float, digits: int) -> str:
    """So many digits at least, without an exponent: 1,234 is 1234, and 0.00123 itself."""
    if abs(value) >= 10**digits:
        return f"{value:.0f}"
    return f"{value:.5f}" if 0 < abs(value) < 1e-4 else f"{value:.{digits}g}"


def _write(c: AblationsConfig, output: Path, found: Sequence[Measured]) -> None:
    tree = {"runs": [vars(run) for run in found], "config": config.to_tree(c)}
    draft = output / f"{c.name}.{os.getpid()}.json"  # others may write as well
    draft.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    draft.replace(output / f"{c.name}.json")
    _draw(c, output / f"{c.name}.png", found)


def _draw(c: AblationsConfig, path: Path, found: Sequence[Measured]) -> None:
    from matplotlib.figure import Figure  # imports take a second

    names = [variant.name for variant in c.variants]
    figure = Figure(figsize=(2.2 * len(METRICS) + 1.5, 0.32 * len(names) + 1.2), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(METRICS), sharey=True), METRICS, strict=True):
        for run in found:
            axes.plot(run.metrics[metric], names.index(run.variant), "o", color="tab:blue", alpha=0.6)
        axes.set(title=metric, yticks=range(len(names)), yticklabels=names)
        if metric.startswith("error"):
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "25" else "")
        axes.grid(alpha=0.3, which="both")
    axes.invert_yaxis()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    command.run(
        AblationsConfig, ablations, __doc__ or "", example="python -m pipelines.ablations yamls/learn/ablations.yaml seeds='[0]'"
    )
