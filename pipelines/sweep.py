"""Sample and evaluate over the values of one setting, and draw each metric over it (paper, Figures 5 and 6).

``python -m pipelines.sweep yamls/sweep.yaml vary=cascade.corruption values='[0,0.1,0.2,0.4]'``. Every value is a sampling job and
an evaluation of its own, whose commands are shown; what has finished is not run again. Writes sweep.json and sweep.png.
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model import command, config
from pipelines.chain import MODULE, Progress, Stage, alone_in
from pipelines.evaluate import EvaluateConfig
from pipelines.sample import SampleConfig

LARGER_IS_BETTER = ("clipsim", "inception_score")


@dataclass(frozen=True)
class SeriesConfig:
    """One line of the figure: a sampler, say."""

    name: str
    overrides: tuple[str, ...] = ()  # key=value for the sampling jobs


@dataclass(frozen=True)
class SweepConfig:
    """Which setting to vary, over what, and how each value is sampled and measured."""

    vary: str  # a key of pipelines.sample
    values: tuple[float, ...]
    sample: str = "yamls/sample.yaml"
    evaluate: str = "yamls/evaluate.yaml"
    series: tuple[SeriesConfig, ...] = (SeriesConfig("all"),)
    sample_overrides: tuple[str, ...] = ()  # key=value for all sampling jobs
    evaluate_overrides: tuple[str, ...] = ()
    output: str = "runs/sweep"
    processes: int = 1

    def __post_init__(self) -> None:
        if not self.values or len(set(self.values)) < len(self.values):
            raise ValueError(f"values must name at least one, each once, got {list(self.values)}")
        names = [line.name for line in self.series]
        if not names or len(set(names)) < len(names) or not all(re.fullmatch(r"[\w.-]+", name) for name in names):
            raise ValueError(f"series must have names of letters, digits, dots and dashes, each its own, got {names}")
        if self.processes < 1:
            raise ValueError(f"processes must be at least 1, got {self.processes}")


@dataclass(frozen=True)
class Point:
    """What was measured at one value of one line."""

    series: str
    value: float
    metrics: dict[str, float]


def sweep(c: SweepConfig) -> None:
    """Run what is missing, and draw.

    Raises:
        UserError: settings that the jobs would refuse, another sweep at work in the folder, or a job that failed.
    """
    output = Path(c.output)
    jobs = [(line, value, output / f"{line.name}-{value:g}") for line in c.series for value in c.values]
    for line, value, folder in jobs:  # told now, not after hours
        config.load(SampleConfig, c.sample, _sampling(c, line, value, folder))
        config.load(EvaluateConfig, c.evaluate, _measuring(c, folder))
    output.mkdir(parents=True, exist_ok=True)
    launcher = (str(Path(sys.executable).with_name("composer")), "-n", str(c.processes)) if c.processes > 1 else ()
    points = []
    with alone_in(output):
        progress = Progress(output, 2 * len(jobs), "SWEEP_FOLDER")
        for line, value, folder in jobs:
            for title, name, yaml, overrides in (
                ("sample", "sample", c.sample, _sampling(c, line, value, folder)),
                ("measure", "evaluate", c.evaluate, _measuring(c, folder)),
            ):
                program = (*launcher, f"pipelines/{name}.py") if launcher else (*MODULE, f"pipelines.{name}")
                progress.run(Stage(f"{title} {line.name} at {c.vary} = {value:g}", (*program, yaml, *overrides)))
            points.append(Point(line.name, value, _measured(folder)))
        _write(c, output, points)


def _sampling(c: SweepConfig, line: SeriesConfig, value: float, folder: Path) -> tuple[str, ...]:
    whole = int(value) if value == int(value) else value  # a number of steps is none with a point
    return (*c.sample_overrides, *line.overrides, f"{c.vary}={whole}", f"output={folder}")


def _measuring(c: SweepConfig, folder: Path) -> tuple[str, ...]:
    return (*c.evaluate_overrides, f"generated={folder}")


def _measured(folder: Path) -> dict[str, float]:
    results = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["results"]
    return {entry["metric"]: float(entry["value"]) for entry in results}


def _write(c: SweepConfig, output: Path, points: list[Point]) -> None:
    names = list(points[0].metrics)
    tree: dict[str, Any] = {"vary": c.vary, "points": [vars(point) for point in points], "config": config.to_tree(c)}
    (output / "sweep.json").write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    _draw(c, output / "sweep.png", points, names)
    width = max(len(point.series) for point in points)
    print(f"{'':{width}}{c.vary.rpartition('.')[2]:>14}" + "".join(f"{name:>17}" for name in names))
    for point in points:
        print(f"{point.series:{width}}{point.value:14g}" + "".join(f"{point.metrics[name]:17.4g}" for name in names))
    for name in names:
        best = (max if name in LARGER_IS_BETTER else min)(points, key=lambda point: point.metrics[name])
        print(f"best {name}: {best.metrics[name]:.4g} of {best.series} at {c.vary} = {best.value:g}")
    print(f"figure: {output / 'sweep.png'}\nnumbers: {output / 'sweep.json'}")


def _draw(c: SweepConfig, path: Path, points: list[Point], names: list[str]) -> None:
    from matplotlib.figure import Figure  # imports take a second

    figure = Figure(figsize=(4.2 * len(names), 3.4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for line in c.series:
            found = sorted((point.value, point.metrics[name]) for point in points if point.series == line.name)
            axes.plot(*zip(*found, strict=True), marker="o", label=line.name)
        axes.set(
            xlabel=c.vary.rpartition(".")[2], title=f"{name} ({'larger' if name in LARGER_IS_BETTER else 'smaller'} is better)"
        )
        axes.grid(alpha=0.3)
        if len(c.series) > 1:
            axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    command.run(
        SweepConfig,
        sweep,
        __doc__ or "",
        example="python -m pipelines.sweep yamls/sweep.yaml vary=cascade.corruption values='[0,0.1,0.2]'",
    )
