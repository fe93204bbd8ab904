"""What a data set holds, on one page: ``python -m dataprep.report OUTPUT`` writes ``OUTPUT/report.html``.

The job does so at its end. One self-contained file: counts, reasons, histograms with the thresholds in them, a seeded sheet of
kept clips, and examples of each reason for which clips were filtered. Captions, keys and paths are anyone's words: all are
escaped, and the page may load nothing.
"""

import argparse
import base64
import dataclasses
import io
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dataprep import disk, shards
from dataprep.encode import decode_frame
from dataprep.selection import SelectConfig
from model import command
from model.errors import UserError

REPORT_NAME = "report.html"
SHEET_CLIPS = 24
EXAMPLES = 6  # of each reason
THUMBNAIL_HEIGHT = 72  # pixels
STRIP_FRAMES = 4  # of a video, side by side
MOTION_FLOOR = 1e-5  # less is drawn there: the axis is logarithmic
OPTIONAL = ("text_area", "aesthetic")  # scores by models (dataprep/looks.py)
Series = dict[tuple[str, str], list[dict[str, Any]]]  # (data set, folder) -> shards
COLOURS = {"kept": "#3b7a57", "filtered": "#d08c3f"}

TEMPLATE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1240px; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } td, th { padding: .2rem .9rem .2rem 0; text-align: left; vertical-align: top; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
.tables { display: flex; flex-wrap: wrap; gap: 3rem; } .plot { width: 100%; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(370px, 1fr)); gap: 1rem; }
figure { margin: 0; } figure img { max-width: 100%; display: block; }
figcaption { font-size: .85rem; overflow-wrap: anywhere; max-height: 9rem; overflow-y: auto; }
.dim { color: #777; font-size: .78rem; }
</style></head><body>
<h1>{{ title }}</h1>
<div class="tables">
{% for table in tables %}<div><h2>{{ table.name }}</h2><table>
{% for name, count, note in table.rows %}<tr><td>{{ name }}</td><td class="n">{{ count }}</td><td class="dim">{{ note }}</td></tr>
{% else %}<tr><td class="dim">none</td></tr>
{% endfor %}</table></div>
{% endfor %}</div>
<h2>Distributions</h2>
<img class="plot" alt="histograms" src="{{ histograms }}">
{% for sheet in sheets %}<h2>{{ sheet.name }}</h2>
<div class="sheet">
{% for cell in sheet.cells %}<figure><img alt="" src="{{ cell.image }}"><figcaption>{{ cell.caption }}
<div class="dim">{{ cell.key }}</div><div class="dim">{{ cell.note }}</div></figcaption></figure>
{% endfor %}</div>
{% endfor %}
{% if not sheets %}<p>No pictures: the pool is gone.</p>{% endif %}
</body></html>
"""


@dataclasses.dataclass(frozen=True)
class Table:
    """A list of counts."""

    name: str
    rows: list[tuple[str, str, str]]  # name, count, note


@dataclasses.dataclass(frozen=True)
class Cell:
    """A clip on a sheet."""

    image: str  # data URI
    caption: str
    key: str
    note: str


@dataclasses.dataclass(frozen=True)
class Sheet:
    """Clips with something in common."""

    name: str
    cells: list[Cell]


def preload() -> None:
    """Import what ``write`` needs: seconds, which can pass while something else is waited for."""
    import jinja2  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import streaming.base.format  # noqa: F401


def write(output: Path, seed: int = 0, title: str = "") -> Path:
    """Write the report of a finished job's ``output`` into it, and return its path.

    Raises:
        UserError: not an output of dataprep.
    """
    import jinja2

    try:
        job = json.loads((output / shards.JOB_NAME).read_text(encoding="utf-8"))
        stages, frame_rate = job["config"]["stages"], job["config"]["clips"]["frame_rate"]
        select, outcome = SelectConfig(**job["select"]), shards.Outcome(**job["outcome"])
        numbers = _read(output, frame_rate)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise UserError(f"{output} is not a finished output of dataprep: {type(error).__name__}: {error}") from error
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(TEMPLATE)
    html = page.render(
        title=f"Data set {title or output.name}",
        tables=_tables(outcome, numbers.kept_seconds),
        histograms=_uri(_histograms(numbers, select), "png"),
        sheets=_sheets(output, outcome, stages, seed),
    )
    path = output / REPORT_NAME
    partial = path.with_name(f".{REPORT_NAME}.partial")
    partial.write_text(html, encoding="utf-8", errors="replace")
    partial.replace(path)
    return path


class _Column:
    """Numbers of clips or items, kept and filtered ones apart; on disk, since there may be many."""

    def __init__(self, most: int) -> None:
        self._values, self._kept, self._length = disk.array(most, np.float64), disk.array(most, np.bool_), 0

    def add(self, value: float, kept: bool) -> None:
        self._values[self._length], self._kept[self._length] = value, kept
        self._length += 1

    def __len__(self) -> int:
        return self._length

    def histogram(self, ends: tuple[float, float] | None) -> tuple[np.ndarray, list[np.ndarray]]:
        """Edges of the bins, and the number of kept and of filtered values in each."""
        values = self._values[: self._length]
        edges = np.histogram_bin_edges(values, bins=30, range=ends)
        counts = [np.zeros(len(edges) - 1, np.int64) for _ in COLOURS]
        for begin in range(0, self._length, shards.BATCH):
            chunk, kept = values[begin : begin + shards.BATCH], self._kept[begin : begin + shards.BATCH][: self._length - begin]
            for count, mask in zip(counts, (kept, ~kept), strict=True):
                count += np.histogram(chunk[mask], bins=edges)[0]
        return edges, counts


@dataclasses.dataclass(frozen=True)
class _Numbers:
    """What the page shows of all clips and items."""

    columns: dict[str, _Column]
    kept_seconds: float  # of video


def _read(output: Path, frame_rate: float) -> _Numbers:
    items, clips = output / shards.ITEMS_NAME, output / shards.CLIPS_NAME
    count = {path: pq.read_metadata(path).num_rows for path in (items, clips)}
    of_items = {name: _Column(count[items]) for name in ("source seconds", "source rate")}
    of_clips = {
        name: _Column(count[clips]) for name in ("seconds", "words", "motion", "sharpness", "brightness", "bars", *OPTIONAL)
    }
    kept_frames = 0
    for row in shards.rows_of(items, ["kind", "fate", "seconds", "frame_rate"]):
        if row["kind"] == "video" and row["fate"] != "rejected":
            of_items["source seconds"].add(row["seconds"], row["fate"] == "kept")
            of_items["source rate"].add(row["frame_rate"], row["fate"] == "kept")
    for row in shards.rows_of(clips):
        kept = row["fate"] == "kept"
        if row["kind"] == "video":
            kept_frames += kept * row["frames"]
            of_clips["seconds"].add(row["frames"] / frame_rate, kept)
            of_clips["motion"].add(np.log10(max(row["motion"], MOTION_FLOOR)), kept)
        of_clips["words"].add(len(row["caption"].split()), kept)
        of_clips["sharpness"].add(row["sharpness"], kept)
        of_clips["brightness"].add(row["brightness"], kept)
        bars = max(min(row["bar_top"], row["bar_bottom"]), min(row["bar_left"], row["bar_right"]))
        of_clips["bars"].add(2 * bars, kept)
        for name in OPTIONAL:
            if row[name] is not None:
                of_clips[name].add(row[name], kept)
    return _Numbers({**of_items, **of_clips}, kept_frames / frame_rate)


def _tables(outcome: shards.Outcome, kept_seconds: float) -> list[Table]:
    def share(count: int, total: int) -> str:
        return f"{100 * count / total:.1f} %" if total else ""

    inputs = outcome.kept + outcome.filtered + outcome.rejected
    total = outcome.clips_kept + outcome.clips_filtered
    return [
        Table(
            "Inputs",
            [
                (name, f"{count:,}", share(count, inputs))
                for name, count in (("kept", outcome.kept), ("filtered", outcome.filtered), ("rejected", outcome.rejected))
            ],
        ),
        Table(
            "Clips and images",
            [
                ("kept", f"{outcome.clips_kept:,}", share(outcome.clips_kept, total)),
                ("filtered", f"{outcome.clips_filtered:,}", share(outcome.clips_filtered, total)),
                ("kept video", f"{kept_seconds / 3600:,.2f} h", ""),
            ],
        ),
        Table("Samples", [(name, f"{count:,}", "") for name, count in sorted(outcome.samples.items())]),
        Table("Clips filtered as", _ranked(outcome.clip_reasons, total)),
        Table("Inputs rejected as", _ranked(outcome.reasons, inputs)),
    ]


def _ranked(reasons: dict[str, int], total: int) -> list[tuple[str, str, str]]:
    return [(name, f"{count:,}", f"{100 * count / total:.1f} %") for name, count in Counter(reasons).most_common()]


def _histograms(numbers: _Numbers, select: SelectConfig) -> bytes:
    """A PNG of eight panels or more, kept and filtered clips stacked, thresholds as lines."""
    from matplotlib.figure import Figure  # half a second to import

    least = float(np.log10(max(select.min_motion, MOTION_FLOOR)))
    panels: list[tuple[str, str, tuple[float, float] | None, float | None]] = [
        ("seconds of a source", "source seconds", None, None),
        ("frames per second of a source", "source rate", None, None),
        ("seconds of a clip", "seconds", None, None),
        ("words of a caption", "words", None, None),
        ("motion, power of ten", "motion", (float(np.log10(MOTION_FLOOR)), 0), least),
        ("sharpness", "sharpness", (0, 1), select.min_sharpness),
        ("brightness", "brightness", (0, 1), select.min_brightness),
        ("black bars", "bars", (0, 1), select.max_letterbox),
    ]
    optional = [
        ("text, share of the picture", "text_area", (0, 1), select.max_text_area),
        ("aesthetic score", "aesthetic", None, select.min_aesthetic),
    ]
    panels += [panel for panel in optional if numbers.columns[panel[1]]]
    rows = -(-len(panels) // 4)
    figure = Figure(figsize=(12.4, 2.7 * rows), dpi=100, layout="constrained")
    for axes in figure.subplots(rows, 4).flat[len(panels) :]:
        axes.remove()
    for axes, (name, column, ends, limit) in zip(figure.axes, panels, strict=True):
        edges, counts = numbers.columns[column].histogram(ends)
        axes.hist(
            [edges[:-1]] * len(counts),
            bins=edges.tolist(),
            weights=counts,
            stacked=True,
            color=list(COLOURS.values()),
            label=list(COLOURS),
        )
        if limit is not None:
            axes.axvline(limit, color="#b03030", linewidth=1, linestyle="--", label="threshold")
        axes.set_title(name, fontsize=10)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.02)
    figure.axes[5].legend(fontsize=8, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _sheets(output: Path, outcome: shards.Outcome, stages: list[dict[str, Any]], seed: int) -> list[Sheet]:
    """Drawn anew for another seed; the same for the same."""
    pool = output / shards.POOL_NAME
    if not (pool / shards.SHARDS_NAME).is_file():
        return []
    stage = max(stages, key=lambda stage: stage["height"] * stage["width"])
    rng = np.random.default_rng(seed)
    counts = {"": outcome.clips_kept, **dict(sorted(outcome.clip_reasons.items()))}  # reason -> clips; empty: kept
    drawn = {
        reason: set(rng.choice(count, size=min(EXAMPLES if reason else SHEET_CLIPS, count), replace=False).tolist())
        for reason, count in counts.items()
        if count
    }
    met: Counter[str] = Counter()
    chosen: dict[str, list[dict[str, Any]]] = {reason: [] for reason in drawn}
    for row in shards.rows_of(output / shards.CLIPS_NAME):
        if met[row["reason"]] in drawn[row["reason"]]:
            chosen[row["reason"]].append(row)
        met[row["reason"]] += 1
    places: dict[str, set[str]] = {}
    for row in itertools.chain.from_iterable(chosen.values()):
        places.setdefault(_dataset(stage, row), set()).add(shards.series_name(row["part"], row["aside"]))
    index = shards.PoolIndex(pool)
    found = {(name, series): entries for name, wanted in places.items() for series, entries in index.series(name, wanted)}
    sheets = []
    for reason, rows in chosen.items():
        name = f"Filtered: {reason}" if reason else "Kept"
        cells = [_cell(pool, found, stage, row) for row in rows]
        sheets.append(Sheet(f"{name} ({len(cells)} of {counts[reason]:,})", cells))
    return sheets


def _dataset(stage: dict[str, Any], row: dict[str, Any]) -> str:
    return f"{stage['name']}/{row['kind']}s"


def _cell(pool: Path, found: Series, stage: dict[str, Any], row: dict[str, Any]) -> Cell:
    pictures = _thumbnails(pool, found, stage, row)
    gap = np.full((THUMBNAIL_HEIGHT, 2, 3), 255, np.uint8)
    strip = [piece for picture in pictures for piece in (picture, gap)][:-1]
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(strip, axis=1)).save(buffer, "JPEG", quality=80)
    moved = f"motion {row['motion']:.4f}, " if row["kind"] == "video" else ""
    note = f"{moved}sharpness {row['sharpness']:.2f}, brightness {row['brightness']:.2f}"
    return Cell(_uri(buffer.getvalue(), "jpeg"), row["caption"], row["key"], row["detail"] or note)


def _thumbnails(pool: Path, found: Series, stage: dict[str, Any], row: dict[str, Any]) -> list[np.ndarray]:
    """Small (h, w, 3) pictures of a few frames of a clip, from the pool."""
    dataset = _dataset(stage, row)
    sample = shards.read_sample(pool, dataset, found[dataset, shards.series_name(row["part"], row["aside"])], row)
    ends = sample["frame_ends"].tolist()
    numbers = np.unique(np.linspace(0, len(ends) - 1, min(STRIP_FRAMES, len(ends))).round().astype(int)).tolist()
    size = (round(stage["width"] * THUMBNAIL_HEIGHT / stage["height"]), THUMBNAIL_HEIGHT)
    pictures = []
    for number in numbers:
        data = sample["frames"][ends[number - 1] if number else 0 : ends[number]]
        picture = decode_frame(data, stage["height"], stage["width"], stage["frame_format"])
        pictures.append(np.asarray(picture.resize(size)))
    return pictures


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write a page about a prepared data set: counts, reasons, histograms, samples.")
    parser.add_argument("output", help="the output folder of dataprep.run")
    parser.add_argument("--seed", type=int, default=0, help="of the clips that are shown (default 0)")
    parser.add_argument("--debug", action="store_true", help="show stack traces of errors")
    options = parser.parse_args(arguments)
    command.guard(lambda: print(f"report: {write(Path(options.output), options.seed)}", flush=True), options.debug)


if __name__ == "__main__":
    main()
