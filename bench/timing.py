"""What the comparisons share: the clock."""

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock time of ``work``, to its end on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(work: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each piece of work in each of ``rounds``, in which they take turns; a round before them warms up."""
    times: dict[str, list[float]] = {name: [] for name in work}
    shown = sys.stderr.isatty()
    for round_ in range(rounds + 1):
        for number, (name, body) in enumerate(work.items(), start=1):
            took = seconds(body, device)
            if shown:
                print(f"\r\033[Kround {round_} of {rounds}, {number} of {len(work)}", end="", file=sys.stderr, flush=True)
            if round_:
                times[name].append(took)
    if shown:
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    return times


def name_of(device: torch.device) -> str:
    """What ran, for the report."""
    return torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
