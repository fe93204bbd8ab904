"""The paper's ablations on Moving Scenes: variants of stage 1, trained with the same compute and several seeds, and measured.

``python -m pipelines.ablations yamls/learn/ablations.yaml`` trains on the data of ``make learn``. Each run is a training and a
``pipelines.learned`` of its own, whose commands are shown; what has finished is not run again. Writes ablations.json and
ablations.png, and prints a table.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from model import budget, command, config
from model.config import UserError
from model.train import TrainConfig
from pipelines.chain import MODULE, Progress, Stage, alone_in, trainer


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
    train: str = "yamls/learn/stage1.yaml"
    learned: str = "yamls/learn/learned.yaml"
    folder: str = "runs/learn"  # of the data that make learn prepared
    output: str = "runs/learn/ablations"
    teraflops: float = 20.0  # 10^12 operations of each training run, counted as by pipelines.plan: equal compute
    seeds: tuple[int, ...] = (0, 1, 2)
    processes: int = 2
    overrides: tuple[str, ...] = ()  # key=value for all training runs
    measure: tuple[str, ...] = ()  # key=value for all measurements

    def __post_init__(self) -> None:
        names = [variant.name for variant in self.variants]
        if not names or len(set(names)) < len(names) or not all(re.fullmatch(r"[\w.-]+", name) for name in names):
            raise ValueError(f"variants must have names of letters, digits, dots and dashes, each its own, got {names}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds must name at least one, each once and none negative, got {list(self.seeds)}")
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
    found = []
    for seed in c.seeds:  # all variants once, then again: stopped early, it has something to show
        for variant in c.variants:
            metrics = _run(c, variant, seed, steps[variant.name])
            found.append(Measured(variant.name, seed, steps[variant.name], metrics))
            _write(c, output, found)
    print(_table(c, found))
    print(f"figure: {output / 'ablations.png'}\nnumbers: {output / 'ablations.json'}")


def _steps(c: AblationsConfig, variant: VariantConfig) -> int:
    """As many optimiser steps as the compute allows."""
    told = config.load(TrainConfig, variant.train or c.train, _training(c, variant, c.seeds[0], 1))
    # Operations do not depend on the precision, and the count is of a GPU's step.
    step = budget.count(told, gpus=c.processes).computation.step * told.global_batch
    steps = int(c.teraflops * 1e12 / step)
    if steps < 1:
        raise UserError(f"{variant.name}: a step takes {step / 1e12:.2g} teraflops, more than the run's {c.teraflops:g}")
    return steps


def _training(c: AblationsConfig, variant: VariantConfig, seed: int, steps: int) -> tuple[str, ...]:
    name = f"{variant.name}-{seed}"
    own = (f"name={name}", f"seed={seed}", f"schedule.steps={steps}", f"folder={Path(c.output) / 'runs'}")
    return (*c.overrides, *variant.overrides, *own, f"publish.name=ablation-{name}")


def _run(c: AblationsConfig, variant: VariantConfig, seed: int, steps: int) -> dict[str, float]:
    """Train and measure one run, unless that is done."""
    name = f"{variant.name}-{seed}"
    folder = Path(c.output) / name
    folder.mkdir(exist_ok=True)
    yaml = variant.train or c.train
    measure = (f"output={folder}", f"cascade.stage1=models:/ablation-{name}@learn", "cascade.stage2=null", "high=null")
    with alone_in(folder):
        progress = Progress(folder, 2, "LEARN_FOLDER", Path(c.folder))
        progress.run(Stage(f"train {name}, {steps} steps", (*trainer(c.processes), yaml, *_training(c, variant, seed, steps))))
        progress.run(Stage(f"measure {name}", (*MODULE, "pipelines.learned", c.learned, *c.measure, *measure)))
    tree = json.loads((folder / "learned.json").read_text(encoding="utf-8"))
    return {metric: read(tree) for metric, read in METRICS.items()}


def _spread(found: Sequence[Measured], variant: str, metric: str) -> tuple[float, float | None]:
    """Mean and standard deviation over seeds."""
    values = [run.metrics[metric] for run in found if run.variant == variant]
    return mean(values), stdev(values) if len(values) > 1 else None


def _table(c: AblationsConfig, found: Sequence[Measured]) -> str:
    """Markdown, so that it can be pasted into the docs."""
    lines = ["| variant | steps | " + " | ".join(METRICS) + " |", "|---" * (len(METRICS) + 2) + "|"]
    for variant in c.variants:
        steps = next(run.steps for run in found if run.variant == variant.name)
        cells = []
        for metric in METRICS:
            middle, spread = _spread(found, variant.name, metric)
            cells.append(f"{middle:.3g}" + (f" ± {spread:.2g}" if spread is not None else ""))
        lines.append(f"| {variant.name} | {steps} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _write(c: AblationsConfig, output: Path, found: Sequence[Measured]) -> None:
    tree = {"runs": [vars(run) for run in found], "config": config.to_tree(c)}
    (output / "ablations.json").write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    _draw(c, output / "ablations.png", found)


def _draw(c: AblationsConfig, path: Path, found: Sequence[Measured]) -> None:
    from matplotlib.figure import Figure  # imports take a second

    names = [variant.name for variant in c.variants]
    figure = Figure(figsize=(2.2 * len(METRICS) + 1.5, 0.32 * len(names) + 1.2), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(METRICS), sharey=True), METRICS, strict=True):
        for run in found:
            axes.plot(run.metrics[metric], names.index(run.variant), "o", color="tab:blue", alpha=0.6)
        axes.set(title=metric, yticks=range(len(names)), yticklabels=names)
        axes.grid(alpha=0.3)
    axes.invert_yaxis()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    command.run(
        AblationsConfig, ablations, __doc__ or "", example="python -m pipelines.ablations yamls/learn/ablations.yaml seeds='[0]'"
    )
