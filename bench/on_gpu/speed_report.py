"""The table of part "speed": each step at its best batch, and how many times as fast one subject is as the other."""

from collections.abc import Sequence
from typing import Any

STEPS = ("training", "sampling")
# How many times as fast FIT 500M is as the U-Net 284M: on an A100 by the paper's Table 2, and our aim.
PAPER = {"training": 3.31, "sampling": 4.49}
AIM = {"training": 4.5, "sampling": 6.0}
AIMED_SHARE = 0.5  # of the matrix product's rate, by FIT 500M

Row = dict[str, Any]
Best = dict[tuple[str, str, str], Row]  # by subject, step and mode


def report(rows: list[Row]) -> list[str]:
    """The lines of the table."""
    product = next((row["flops"] for row in rows if row["key"].get("peak") == "matrix product"), None)
    copied = next((row["bytes"] for row in rows if row["key"].get("peak") == "copy"), None)
    lines = []
    if product and copied:
        lines.append(f"a large matrix product: {product / 1e12:.4g} TFLOP/s; a large copy: {copied / 1e12:.3g} TB/s")
    measured = [row for row in rows if "subject" in row["key"]]
    if not measured:
        return lines
    lines.append(
        f"{'model':12}{'step':10}{'mode':17}{'batch':>6}{'ms / video':>12}{'spread':>8}{'TFLOP':>9}{'TFLOP/s':>9}{'of peak':>9}"
        f"{'GiB':>7}"
    )
    best = best_rows(measured)
    lines += [_line(row) for row in measured if row in best.values() or row["key"]["batch"] == 1 or "ms" not in row]
    if not any("compiled" in mode or "graph" in mode for _, _, mode in best):
        lines.append("eager alone: neither the compiler nor CUDA graphs have run")
    return lines + ratios(best) + _shares(best)


def best_rows(rows: Sequence[Row]) -> Best:
    """Of each subject, step and mode, the row of the batch at which a video was cheapest."""
    best: Best = {}
    for row in (row for row in rows if "ms" in row):
        key = row["key"]
        place = (key["subject"], key["step"], key["mode"])
        if place not in best or row["ms"] < best[place]["ms"]:
            best[place] = row
    return best


def ratios(best: Best) -> list[str]:
    """How many times as fast the first subject is, in each mode in which both ran, and each in its best mode."""
    subjects = list(dict.fromkeys(subject for subject, _, _ in best))
    if len(subjects) != 2:
        return []
    lines = []
    for kind in STEPS:
        first, second = ({mode: row["ms"] for (s, k, mode), row in best.items() if (s, k) == (own, kind)} for own in subjects)
        modes = [mode for mode in first if mode in second]  # an unfair ratio is none: what one is lacking counts for neither
        if not modes:
            continue
        told = [f"{mode} {second[mode] / first[mode]:.2f}" for mode in modes]
        told.append(f"each at its best {min(second[m] for m in modes) / min(first[m] for m in modes):.2f}")
        snap = subjects == ["FIT 500M", "U-Net 284M"]
        against = f" (aim {AIM[kind]:g}; the paper, on an A100: {PAPER[kind]:g})" if snap else ""
        lines.append(f"{kind}: speed of {subjects[0]} over {subjects[1]}: {', '.join(told)}{against}")
    return lines


def _line(row: Row) -> str:
    key = row["key"]
    named = f"{key['subject']:12}{key['step']:10}{key['mode']:17}{key['batch']:6}"
    if row.get("out_of_memory"):
        return f"{named}  out of memory"
    if "failed" in row:
        return f"{named}  failed: {row['failed']}"
    memory = f"{'-':>7}" if row["memory_gib"] is None else f"{row['memory_gib']:7.1f}"
    numbers = f"{row['ms']:12.3f}{row['spread']:8.0%}{row['tflop']:9.3g}{row['tflops']:9.3g}{row['of_peak']:9.1%}"
    return named + numbers + memory


def _shares(best: Best) -> list[str]:
    """The largest share of the machine's rate that FIT 500M reaches in training."""
    shares = [row["of_peak"] for (subject, kind, _), row in best.items() if (subject, kind) == ("FIT 500M", "training")]
    if not shares:
        return []
    return [f"training FIT 500M reaches {max(shares):.0%} of the matrix product's rate (aim {AIMED_SHARE:.0%})"]
