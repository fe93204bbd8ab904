"""Part "walt": W.A.L.T.'s models, measured as part "speed" measures Snap Video's, once subjects.py lists some."""

from typing import Any

import torch

from bench.on_gpu import speed
from bench.on_gpu.record import Record
from bench.on_gpu.subjects import WALT


def run(record: Record, device: torch.device, tiny: bool, seconds_left: float) -> None:
    """Measure what the record lacks, for so long."""
    if WALT:
        speed.run(record, device, tiny, seconds_left, WALT)


def report(rows: list[dict[str, Any]]) -> list[str]:
    """As part "speed"."""
    return speed.report(rows) if WALT else ["nothing to measure: no W.A.L.T. in this checkout"]
