"""How long a step takes on a GPU at best: a roofline over its traced operations (model/planning/trace.py). Imports torch alone.

Each kernel takes the longer of two times: its operations over the rate of the unit that does them, and the bytes that it moves
over the memory's bandwidth. Eager, each operation is a kernel of its own, and the host needs a while to launch each; a step takes
the longer of the device's time and the host's. Fused, each chain of element-wise operations and reductions between two products
is one kernel that moves what enters the chain and what leaves it, as torch.compile makes it, and nothing waits for the host, as
under CUDA graphs.

Not counted: communication between GPUs, waiting for data, and what a kernel falls short of for its shape.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from model.planning.trace import Operation


@dataclass(frozen=True)
class Device:
    """A GPU by its maker's datasheet: dense rates in FLOP/s, bandwidth in bytes/s."""

    name: str
    lowered: float  # bfloat16 on the matrix units
    full: float  # float32 without TF32
    bandwidth: float


DEVICES = {
    device.name: device
    for device in (
        Device("A100", 312e12, 19.5e12, 2.04e12),  # SXM, 80 GB
        Device("H100", 989e12, 67e12, 3.35e12),  # SXM
        Device("H200", 989e12, 67e12, 4.8e12),
        Device("B200", 2250e12, 75e12, 8.0e12),
    )
}

# What of the datasheet's peak real kernels reach, large ones at that. Assumed, until bench/gpu.py has measured the first and the
# last on the GPU at hand.
REACHED = {"product": 0.8, "convolution": 0.6, "attention": 0.5}
REACHED_BANDWIDTH = 0.9
HOST_LAUNCH = 6e-6  # seconds that PyTorch's dispatcher and autograd take on the host for a kernel
KERNEL = 2e-6  # seconds that the shortest kernel occupies the device


@dataclass(frozen=True)
class Kernel:
    """What is launched as one (fused) or as several (``launches``)."""

    part: str
    phase: str
    kind: str
    flops: int
    bytes: int
    launches: int
    lowered: bool

    def seconds(self, device: Device) -> float:
        """On the device, without the host."""
        rate = (device.lowered if self.lowered else device.full) * REACHED.get(self.kind, 1.0)
        moved = self.bytes / (device.bandwidth * REACHED_BANDWIDTH)
        return max(self.flops / rate, moved, KERNEL * self.launches)


@dataclass(frozen=True)
class Row:
    """A part of the model, or all of it."""

    part: str
    flops: int
    bytes: int
    launches: int
    seconds: float


def eager(operations: Iterable[Operation]) -> list[Kernel]:
    """A kernel for each operation."""
    return [Kernel(o.part, o.phase, o.kind, o.flops, o.bytes, o.launches, o.lowered) for o in operations]


def fused(operations: Sequence[Operation]) -> list[Kernel]:
    """Chains of element-wise operations and reductions as single kernels."""
    readers: defaultdict[int, list[int]] = defaultdict(list)  # of each storage, the numbers of the operations that read it
    for number, operation in enumerate(operations):
        for storage in operation.reads:
            readers[storage].append(number)
    kernels = []
    for run in _runs(operations):
        if operations[run.start].kind != "pointwise":
            kernels += eager(operations[run.start : run.stop])
            continue
        for members in _chains(operations, run):
            inside = set(members)
            made = {storage for number in members for storage in operations[number].writes}
            reads: dict[int, int] = {}
            writes: dict[int, int] = {}
            for number in members:
                for storage, size in operations[number].reads.items():
                    if storage not in made:
                        reads[storage] = max(size, reads.get(storage, 0))
                for storage, size in operations[number].writes.items():
                    read_by = readers[storage]
                    if not read_by or any(reader not in inside for reader in read_by):  # it leaves the chain, or is a result
                        writes[storage] = max(size, writes.get(storage, 0))
            first = operations[members[0]]
            moved = sum(reads.values()) + sum(writes.values())
            kernels.append(Kernel(first.part, first.phase, "pointwise", 0, moved, 1, first.lowered))
    return kernels


def seconds(kernels: Iterable[Kernel], device: Device, hosted: bool) -> float:
    """Of a whole step; ``hosted`` where the host launches each kernel."""
    kernels = list(kernels)
    busy = sum(kernel.seconds(device) for kernel in kernels)
    return max(busy, HOST_LAUNCH * sum(kernel.launches for kernel in kernels)) if hosted else busy


def by_part(kernels: Iterable[Kernel], device: Device) -> list[Row]:
    """Rows of the parts, the slowest first; their times are those of the device alone, and add up."""
    rows: dict[str, Row] = {}
    for k in kernels:
        row = rows.get(k.part, Row(k.part, 0, 0, 0, 0.0))
        rows[k.part] = replace(
            row,
            flops=row.flops + k.flops,
            bytes=row.bytes + k.bytes,
            launches=row.launches + k.launches,
            seconds=row.seconds + k.seconds(device),
        )
    return sorted(rows.values(), key=lambda row: -row.seconds)


def _runs(operations: Sequence[Operation]) -> Iterator[range]:
    """Runs of consecutive element-wise operations of one phase; each other operation is a run of its own."""
    start = 0
    for number, operation in enumerate(operations):
        before = operations[number - 1] if number else operation
        same = operation.kind == before.kind == "pointwise" and operation.phase == before.phase
        if number > start and not same:
            yield range(start, number)
            start = number
    if operations:
        yield range(start, len(operations))


def _chains(operations: Sequence[Operation], run: range) -> list[list[int]]:
    """The operations of a run, grouped by what they hand to each other or read from the same place."""
    group: dict[int, int] = {number: number for number in run}

    def root(number: int) -> int:
        while group[number] != number:
            number = group[number]
        return number

    seen: dict[int, int] = {}
    for number in run:
        operation = operations[number]
        for storage in chain(operation.reads, operation.writes):
            if storage in seen:
                group[root(number)] = root(seen[storage])
            seen[storage] = number
    chains: defaultdict[int, list[int]] = defaultdict(list)
    for number in run:
        chains[root(number)].append(number)
    return list(chains.values())
