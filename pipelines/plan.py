"""Plan a training run before it starts: sizes, computation and memory of a training yaml, without allocating the model.

Everything is counted from the model's own training step (docs/plan.md). 1 GiB is 2^30 bytes, 1 TFLOP 10^12 operations.
"""

import math
from json import dumps

from model import command
from model.train import TrainConfig
from pipelines.budget import GIB, Budget, NoiseScale, count

FLAGS = (
    command.Flag("gpus", 8, "number of GPUs"),
    command.Flag("gpu-memory", 80.0, "memory of a GPU in GiB; cards sold as 80 GB have 80"),
    command.Flag("json", False, "print one flat JSON object instead; docs/plan.md lists its keys"),
)


def show(c: TrainConfig, gpus: int, gpu_memory: float, json: bool) -> None:
    """The command: print the plan."""
    budget = count(c, gpus, gpu_memory)
    print(dumps(budget.flat(), indent=2) if json else table(budget))


def table(p: Budget) -> str:
    """For people: sections of aligned lines."""
    n, m, f, r = p.parameters, p.memory, p.computation, p.run
    sections: list[tuple[str, list[tuple[str, str, str]]]] = [
        (
            "parameters",
            [
                *((part, _count(size), f"{size / n.total:.1%}") for part, size in n.components.items()),
                ("total", _count(n.total), f"{n.total:,}"),
            ],
        ),
        ("tokens", [(name, f"{number:,}", "") for name, number in p.tokens.items()]),
        (
            "computation per video",
            [
                ("first pass", _tera(f.first_pass), "self-conditioning"),
                ("forward", _tera(f.forward), ""),
                ("backward", _tera(f.backward), ""),
                ("recomputation", _tera(f.recomputation), "activation checkpointing" if f.recomputation else "none"),
                ("training step", _tera(f.step), "the four"),
            ],
        ),
        (
            f"memory on each of {p.gpus} GPUs",
            [
                ("weights", _gib(m.weights), "float32, sharded"),
                ("gradients", _gib(m.gradients), "float32, sharded"),
                ("moments", _gib(m.moments), "LAMB, float32, sharded"),
                ("average", _gib(m.average), "EMA, float32, sharded"),
                ("state", _gib(m.state), "the four"),
                ("gathered", _gib(m.gathered), f"whole weights of the root and two blocks, {p.precision}"),
                ("reducing", _gib(m.reducing), "whole gradients of the root and a block, and a reduction's buffer"),
                ("batch", _gib(m.batch), f"{r.gpu_batch:,} samples from the loader"),
                (
                    "activations",
                    _gib(m.activations),
                    f"microbatch of {r.microbatch}, peak; {_gib(m.activations_kept)} kept to backward",
                ),
                ("  of one sample", _gib(m.activations_sample), "peak"),
                ("peak in training", _gib(m.training), "state, gathered, reducing, batch, activations"),
                ("peak in update", _gib(m.update), f"state, batch, and the optimiser's {_gib(m.optimizer)}"),
                (
                    "total",
                    _gib(m.total),
                    f"{'fits' if p.fit.fits else 'DOES NOT FIT'}: {_gib(p.fit.usable)} of {_gib(p.fit.gpu_memory)} are usable",
                ),
                ("largest microbatch", f"{p.fit.largest_microbatch:,}", "that fits" if p.fit.largest_microbatch else "none fits"),
            ],
        ),
        (
            "run",
            [
                (
                    "steps",
                    f"{r.steps:,}",
                    f"{r.global_batch:,} samples each: per GPU {r.gpu_batch:,} in {r.microbatches} microbatches",
                ),
                ("samples", _count(r.samples), f"{_count(r.videos)} videos, {_count(r.images)} images"),
                ("computation", f"{r.flops / 1e21:.4g} ZFLOP", "1 ZFLOP = 10^21"),
                ("sigma_in", f"{p.noise.sigma_in:g}", _verdict(p.noise)),
            ],
        ),
    ]
    lines = [f"{p.name} on {p.gpus} GPUs"]
    rows = [row for _, section in sections for row in section]
    left, middle = max(len(row[0]) for row in rows), max(len(row[1]) for row in rows)
    for title, section in sections:
        lines += ["", title, *(f"  {name:<{left}}  {value:>{middle}}  {note}".rstrip() for name, value, note in section)]
    return "\n".join(lines)


def _verdict(noise: NoiseScale) -> str:
    followed = math.isclose(noise.sigma_in, noise.rule, rel_tol=0.01)
    return f"{'as' if followed else 'NOT as'} the rule says: s sqrt(T) = {noise.rule:.4g}"


def _count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"


def _tera(flops: int) -> str:
    return f"{flops / 1e12:.3f} TFLOP"


if __name__ == "__main__":
    command.run(TrainConfig, show, __doc__ or "", example="python -m pipelines.plan yamls/stage1.yaml --gpus 64", flags=FLAGS)
