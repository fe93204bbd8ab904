"""Plan a training run before it starts: sizes, computation, memory and time of a training yaml, without allocating the model.

Everything is counted from the model's own training step (docs/plan.md). 1 GiB is 2^30 bytes, 1 TFLOP 10^12 operations.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict
from json import dumps

from model import command
from model.errors import UserError
from model.planning.device_memory import Parameters
from model.planning.memory_plan import Budget, Computation, count
from model.planning.roofline import DEVICES, Row
from model.planning.time_plan import DAY, Time, TimePlan, predict
from model.train import TrainConfig

FLAGS = (
    command.Flag("gpus", 8, "number of GPUs"),
    command.Flag("gpu-memory", 80.0, "memory of a GPU in GiB; cards sold as 80 GB have 80"),
    command.Flag("roofline", "", f"also print each part's time on one of {', '.join(DEVICES)}"),
    command.Flag("json", False, "print one flat JSON object instead; docs/plan.md lists its keys"),
)


def show(c: TrainConfig, gpus: int, gpu_memory: float, roofline: str, json: bool) -> None:
    """The command: print the plan."""
    if roofline and roofline not in DEVICES:
        raise UserError(f"roofline: {roofline!r} is no known GPU; they are {', '.join(DEVICES)}")
    budget, times = count(c, gpus, gpu_memory), predict(c, gpus)
    if json:
        flat = budget.flat()
        for plan in times:
            for name, time in (("eager", plan.eager), ("fused", plan.fused)):
                flat |= {f"time.{plan.device.name.lower()}.{name}.{key}": value for key, value in asdict(time).items()}
        print(dumps(flat, indent=2))
        return
    print(table(budget, times))
    for plan in times:
        if plan.device.name == roofline:
            print("\n" + parts(plan))


Line = tuple[str, str, str]  # what, how much, and a note


def table(b: Budget, times: Sequence[TimePlan]) -> str:
    """For people: sections of aligned lines."""
    sections = {
        "parameters": _parameters(b.parameters),
        "tokens": [(name, f"{number:,}", "") for name, number in b.tokens.items()],
        "computation per video": _computation(b.computation),
        f"memory on each of {b.gpus} GPUs": _memory(b),
        "run": _run(b),
        f"time on {b.gpus} GPUs at best, by the roofline (docs/plan.md says what it leaves out)": _times(times),
    }
    rows = [row for section in sections.values() for row in section]
    left, middle = max(len(row[0]) for row in rows), max(len(row[1]) for row in rows)
    lines = [f"{b.name} on {b.gpus} GPUs, {b.precision}"]
    for title, section in sections.items():
        lines += ["", title, *(f"  {name:<{left}}  {value:>{middle}}  {note}".rstrip() for name, value, note in section)]
    return "\n".join(lines)


def parts(plan: TimePlan) -> str:
    """The roofline of each part of the model, per video of a microbatch: what is the wall, and what fusing would take out."""
    fused = {row.part: row for row in plan.parts_fused}
    head = f"{'part':<38}{'GFLOP':>10}" + f"{'MB':>10}{'kernels':>9}{'ms':>9}" * 2
    title = f"roofline of a video in a microbatch of {plan.microbatch} on a {plan.device.name}"
    lines = [title, f"{'':48}{'eager':>28}{'fused':>28}", head]
    for row in plan.parts_eager:
        lines.append(f"{row.part:<38}{_cells(row, plan.microbatch)}{_cells(fused.get(row.part), plan.microbatch)[10:]}")
    return "\n".join(lines)


def _cells(row: Row | None, videos: int) -> str:
    if row is None:  # all of the part went into chains that begin in another
        return f"{'-':>10}{'-':>10}{'-':>9}{'-':>9}"
    return f"{row.flops / videos / 1e9:10.1f}{row.bytes / videos / 1e6:10.1f}{row.launches:9,}{1e3 * row.seconds / videos:9.3f}"


def _times(times: Sequence[TimePlan]) -> list[Line]:
    def note(time: Time) -> str:
        return f"{1e3 * time.video:.2f} ms a video, {time.step:.2f} s a step"

    lines: list[Line] = []
    for plan in times:
        fused = f"; fused {plan.fused.run / DAY:.1f} days, {note(plan.fused)}"
        lines.append((plan.device.name, f"{plan.eager.run / DAY:.1f} days", note(plan.eager) + fused))
    return lines


def _parameters(p: Parameters) -> list[Line]:
    parts = [(part, _number(size), f"{size / p.total:.1%}") for part, size in p.components.items()]
    trained = [] if p.trained == p.total else [("trained", _number(p.trained), f"{p.trained / p.total:.2%}")]
    return [*parts, ("total", _number(p.total), f"{p.total:,}"), *trained]


def _computation(c: Computation) -> list[Line]:
    return [
        ("first pass", _flop(c.first_pass), "self-conditioning, without gradient"),
        ("forward", _flop(c.forward), ""),
        ("backward", _flop(c.backward), ""),
        ("recomputation", _flop(c.recomputation), "activation checkpointing" if c.recomputation else "no checkpointing"),
        ("training step", _flop(c.step), "the four"),
    ]


def _memory(b: Budget) -> list[Line]:
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


def _run(b: Budget) -> list[Line]:
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
