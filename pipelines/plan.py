"""Plan a training run before it starts: sizes, computation and memory of a training yaml, without allocating the model.

Everything is counted from the model's own training step (docs/plan.md). 1 GiB is 2^30 bytes, 1 TFLOP 10^12 operations.
"""

import math
from collections.abc import Sequence
from json import dumps

from model import command
from model.planning.memory_plan import Budget, Computation, Parameters, count
from model.train import TrainConfig

FLAGS = (
    command.Flag("gpus", 8, "number of GPUs"),
    command.Flag("gpu-memory", 80.0, "memory of a GPU in GiB; cards sold as 80 GB have 80"),
    command.Flag("json", False, "print one flat JSON object instead; docs/plan.md lists its keys"),
)


def show(c: TrainConfig, gpus: int, gpu_memory: float, json: bool) -> None:
    """The command: print the plan."""
    budget = count(c, gpus, gpu_memory)
    print(dumps(budget.flat(), indent=2) if json else table(budget))


Row = tuple[str, str, str]  # what, how much, and a note


def table(b: Budget) -> str:
    """For people: sections of aligned lines."""
    sections = {
        "parameters": _parameters(b.parameters),
        "tokens": [(name, f"{number:,}", "") for name, number in b.tokens.items()],
        "computation per video": _computation(b.computation),
        f"memory on each of {b.gpus} GPUs": _memory(b),
        "run": _run(b),
    }
    rows = [row for section in sections.values() for row in section]
    left, middle = max(len(row[0]) for row in rows), max(len(row[1]) for row in rows)
    lines = [f"{b.name} on {b.gpus} GPUs, {b.precision}"]
    for title, section in sections.items():
        lines += ["", title, *(f"  {name:<{left}}  {value:>{middle}}  {note}".rstrip() for name, value, note in section)]
    return "\n".join(lines)


def _parameters(p: Parameters) -> list[Row]:
    parts = [(part, _number(size), f"{size / p.total:.1%}") for part, size in p.components.items()]
    trained = [] if p.trained == p.total else [("trained", _number(p.trained), f"{p.trained / p.total:.2%}")]
    return [*parts, ("total", _number(p.total), f"{p.total:,}"), *trained]


def _computation(c: Computation) -> list[Row]:
    return [
        ("first pass", _flop(c.first_pass), "self-conditioning, without gradient"),
        ("forward", _flop(c.forward), ""),
        ("backward", _flop(c.backward), ""),
        ("recomputation", _flop(c.recomputation), "activation checkpointing" if c.recomputation else "no checkpointing"),
        ("training step", _flop(c.step), "the four"),
    ]


def _memory(b: Budget) -> list[Row]:
    m, fit = b.memory, b.fit
    verdict = f"{'fits' if fit.fits else 'DOES NOT FIT'}: {_bytes(fit.usable)} of {_bytes(fit.gpu_memory)} are usable"
    return [
        ("weights", _bytes(m.weights), "float32, sharded"),
        ("gradients", _bytes(m.gradients), "float32, sharded"),
        ("moments", _bytes(m.moments), "the optimiser's two, float32, sharded"),
        ("average", _bytes(m.average), "EMA, float32, sharded"),
        ("state", _bytes(m.state), "the four"),
        ("gathered", _bytes(m.gathered), "whole weights of the root and two blocks"),
        ("reducing", _bytes(m.reducing), "whole gradients of the root and a block, and a reduction's buffer"),
        ("batch", _bytes(m.batch), f"{b.run.gpu_batch:,} samples from the loader"),
        ("activations", _bytes(m.activations), f"peak in a microbatch of {b.run.microbatch}"),
        ("  kept", _bytes(m.activations_kept), "of these, from forward to backward"),
        ("  one sample", _bytes(m.activations_sample), "peak in a microbatch of 1"),
        ("peak in training", _bytes(m.training), "state, gathered, reducing, batch, activations"),
        ("peak in update", _bytes(m.update), f"state, batch, and {_bytes(m.optimizer)} of the optimiser's temporaries"),
        ("total", _bytes(m.total), verdict),
        ("largest microbatch", f"{fit.largest_microbatch:,}", f"that fits, of {b.run.gpu_batch:,}"),
    ]


def _run(b: Budget) -> list[Row]:
    r, followed = b.run, math.isclose(b.noise.sigma_in, b.noise.rule, rel_tol=0.01)
    return [
        ("steps", f"{r.steps:,}", f"of {r.global_batch:,} samples"),
        ("microbatches", f"{r.microbatches:,}", f"a step, for {r.gpu_batch:,} samples per GPU"),
        ("samples", _number(r.samples), f"{_number(r.videos)} videos, {_number(r.images)} images"),
        ("computation", _flop(r.flops), "all samples"),
        ("sigma_in", f"{b.noise.sigma_in:g}", f"{'as' if followed else 'NOT as'} the rule says: s sqrt(T) = {b.noise.rule:.4g}"),
    ]


def _scaled(value: float, units: Sequence[str], step: int) -> str:
    """The value in the largest unit of which there is at least one."""
    power = max((i for i in range(len(units)) if value >= step**i), default=0)
    return f"{value / step**power:.2f} {units[power]}" if power else f"{value:,} {units[0]}".rstrip()


def _number(count: int) -> str:
    return _scaled(count, ("", "k", "M", "B"), 1000)


def _bytes(size: int) -> str:
    return _scaled(size, ("B", "KiB", "MiB", "GiB"), 1024)


def _flop(operations: int) -> str:
    return _scaled(operations, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP", "ZFLOP"), 1000)


if __name__ == "__main__":
    command.run(TrainConfig, show, __doc__ or "", example="python -m pipelines.plan yamls/stage1.yaml --gpus 64", flags=FLAGS)
