"""Learning curves of training runs, from what they logged to MLflow: ``python -m pipelines.curves yamls/learn/curves.yaml``.

A row of the picture for each run: the training loss, and the loss on held-out clips by noise band, of videos (lines) and of
images (dashed).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model import command
from model.errors import UserError
from model.registry import first_line
from model.tracking import set_up_client

TRAINED = "loss/train/total"
HELD_OUT = "eval/loss/"  # KIND/BAND
WINDOW = 0.02  # share of the steps over which the training loss is averaged

Curve = tuple[np.ndarray, np.ndarray]  # steps, values


@dataclass(frozen=True)
class CurvesConfig:
    """Which runs, and where the picture goes."""

    tracking_uri: str
    experiment: str
    runs: tuple[str, ...]  # by name; of several with one name the newest
    output: str  # png

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("runs must name at least one")


def curves(c: CurvesConfig) -> None:
    """Read and draw.

    Raises:
        UserError: no such store, experiment or run, or one that logged no loss.
    """
    found = {name: history(c, name) for name in c.runs}
    path = Path(c.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(found, path)
    print(f"learning curves of {', '.join(c.runs)}: {path}")


def history(c: CurvesConfig, name: str) -> dict[str, Curve]:
    """A run's losses by metric.

    Raises:
        UserError: as ``curves``.
    """
    from mlflow import MlflowClient  # imports take seconds
    from mlflow.exceptions import MlflowException

    set_up_client(c.tracking_uri)
    client = MlflowClient(c.tracking_uri)
    try:
        experiment = client.get_experiment_by_name(c.experiment)
        if experiment is None:
            raise UserError(f"{c.tracking_uri}: no experiment {c.experiment!r}")
        asked = "tags.mlflow.runName = '{}'".format(name.replace("'", ""))
        runs = client.search_runs([experiment.experiment_id], asked, order_by=["attributes.start_time DESC"], max_results=1)
        if not runs:
            raise UserError(f"{c.tracking_uri}: experiment {c.experiment!r} has no run {name!r}")
        metrics = [key for key in sorted(runs[0].data.metrics) if key == TRAINED or key.startswith(HELD_OUT)]
        found = {key: _curve(client.get_metric_history(runs[0].info.run_id, key)) for key in metrics}
    except MlflowException as error:
        raise UserError(f"{c.tracking_uri}: {first_line(error)}") from error
    if TRAINED not in found:
        raise UserError(f"{c.tracking_uri}: run {name!r} has logged no {TRAINED}")
    return found


def _curve(entries: Iterable[Any]) -> Curve:
    by_step = {entry.step: entry.value for entry in entries}  # a resumed run repeats steps: the last counts
    steps = sorted(by_step)
    return np.array(steps), np.array([by_step[step] for step in steps])


def smooth(curve: Curve, share: float = WINDOW) -> Curve:
    """Means over windows of a share of the steps, each at its middle."""
    size = max(1, round(len(curve[0]) * share))
    whole = len(curve[0]) // size * size
    steps, values = (part[:whole].reshape(-1, size).mean(axis=1) for part in curve)
    return steps, values


def draw(runs: dict[str, dict[str, Curve]], path: Path) -> None:
    """Write the picture."""
    from matplotlib.figure import Figure  # imports take a second

    figure = Figure(figsize=(11, 3.6 * len(runs)), layout="constrained")
    for row, (name, metrics) in zip(figure.subplots(len(runs), 2, squeeze=False), runs.items(), strict=True):
        row[0].plot(*smooth(metrics[TRAINED]))
        row[0].set(title=f"{name}: training loss", xlabel="step", yscale="log")
        colours: dict[str, str] = {}
        for key in (key for key in metrics if key.startswith(HELD_OUT) and not key.endswith("/total")):
            kind, band = key.removeprefix(HELD_OUT).split("/", 1)
            colour = colours.setdefault(band, f"C{len(colours)}")
            label = band.replace("_", " ") if kind == "videos" else None
            row[1].plot(*metrics[key], "--" if kind == "images" else "-", marker=".", color=colour, label=label)
        row[1].set(title="held-out loss by noise band; dashed: images", xlabel="step", yscale="log")
        if colours:
            row[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        for axes in row:
            axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    command.run(CurvesConfig, curves, __doc__ or "", example="python -m pipelines.curves yamls/learn/curves.yaml")
