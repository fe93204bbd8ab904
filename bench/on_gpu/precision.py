"""Part "precision": whether bfloat16 hurts, in curves of the loss and in the tests of the networks.

The FIT of part "learning" (32 M parameters, 16 frames of 40x64) trains 300 steps of 32 clips from the same weights on the same
clips and the same noise: in float32, in bfloat16 under autocast, and in float32 whose products take TF32. It has no dropout,
whose masks are drawn otherwise for each precision. Rounding alone sets runs apart after a while; TF32 shows by how much, so
bfloat16 hurts where it is farther from float32 than that, and worse.

Then every test that has a ``device`` fixture runs on the device (device_tests.py).
"""

import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.on_gpu.device_tests import EXPRESSIONS, IN_MINIATURE, run_tests
from bench.on_gpu.learning import Plan, full, held_out, pool, small, tiny_plan
from bench.on_gpu.record import Record
from bench.on_gpu.scenes import Batches
from bench.on_gpu.training import Training, errors
from model.networks.fit.config import FITConfig

STEPS, BLOCK = 300, 50
EXACT = "float32"
CURVES: dict[str, tuple[torch.dtype | None, bool]] = {  # autocast, TF32
    EXACT: (None, False),
    "bfloat16": (torch.bfloat16, False),
    "TF32": (None, True),
}
ORDER = (EXACT, "bfloat16", "eager", "TF32", "compiled")  # of curves and tests, the most important first


def plan_of(device: torch.device, tiny: bool) -> Plan:
    """What is trained: as in part "learning", without dropout and in smaller batches."""
    plan = tiny_plan() if tiny else full() if device.type == "cuda" else small()
    network = plan.model.network
    assert isinstance(network, FITConfig)
    model = replace(plan.model, network=replace(network, dropout=0.0))
    recipe = replace(plan.recipe, batch=min(32, plan.recipe.batch), warmup=min(50, plan.recipe.warmup))
    return replace(plan, model=model, recipe=recipe, pool=min(1024, plan.pool))


def run(record: Record, device: torch.device, tiny: bool, seconds_left: float) -> None:
    """Measure what the record lacks, for so long."""
    end = time.monotonic() + seconds_left
    expressions = IN_MINIATURE if tiny else EXPRESSIONS
    plan = plan_of(device, tiny)
    if any(record.find(curve=name) is None for name in CURVES):
        clips, others = pool(plan, device), held_out(plan, device)["seen"]
    for name in ORDER:
        left = end - time.monotonic()
        if left <= 0:
            return
        if name in CURVES and record.find(curve=name) is None:
            _curve(record, name, plan, clips, others, tiny, end)
        if name in expressions and record.find(tests=name) is None:
            record.add({"tests": name}, **run_tests(device.type, expressions[name], left))


def _curve(record: Record, name: str, plan: Plan, clips: Batches, others: Batches, tiny: bool, end: float) -> None:
    """A training in this precision, unless time runs out before its end."""
    precision, tf32 = CURVES[name]
    steps, block = (6, 2) if tiny else (STEPS, BLOCK)
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        training = Training(plan.model, plan.recipe, clips, precision, compiled=False)
        training.step(0.0)  # warms up
        blocks, begin = list[float](), time.monotonic()
        for _ in range(steps // block):
            losses: list[Tensor] = [training.step(0.0) for _ in range(block)]
            blocks.append(float(torch.stack(losses).mean()))
            if time.monotonic() > end:
                return
        spent = time.monotonic() - begin
    finally:
        torch.set_float32_matmul_precision("highest")
    found = errors(training.average, others, plan.held_out)
    record.add({"curve": name}, losses=blocks, ms=1000 * spent / steps, errors=found)
    if (exact := record.find(curve=EXACT)) and name != EXACT:
        apart = [there / here - 1 for there, here in zip(blocks, exact["losses"], strict=True)]
        worse = [found[level] / error - 1 for level, error in exact["errors"].items()]
        record.add({"apart": name}, losses=max(apart, key=abs), errors=max(worse, key=abs))


def report(rows: list[dict[str, Any]]) -> list[str]:
    """Losses and errors of each precision, their distance from float32's, and the tests."""
    lines = []
    for row in rows:
        key = row["key"]
        if "curve" in key:
            losses = " ".join(f"{loss:.4f}" for loss in row["losses"])
            lines.append(f"{key['curve']:10}{row['ms']:8.1f} ms a step; losses {losses}")
            lines.append(f"{'':10}error of D " + ", ".join(f"{error:.4f} at {level}" for level, error in row["errors"].items()))
        elif "apart" in key:
            lines.append(f"{key['apart']:10}from float32 at most: losses {row['losses']:+.1%}, errors {row['errors']:+.1%}")
        elif "tests" in key:
            failed = f"{len(row['failed'])} failed {' '.join(row['failed'])}".rstrip()
            lines.append(f"tests, {key['tests']}: {row['passed']} passed, {failed}" + (f"; {row['why']}" if row["why"] else ""))
    return lines
