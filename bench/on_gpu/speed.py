"""Part "speed": FIT 500M against the U-Net 284M, both at full size, in training and in sampling.

A training step is what training does for a batch up to the gradients: self-conditioning's first pass, forward, loss, backward;
the optimiser is another part. A sampling step is one evaluation of D without guidance. Weights and the blocks' inputs are in
bfloat16 under autocast, as FSDP2 hands them to each pass: with float32 weights and autocast alone, every step would pay for casts
of all weights. What FSDP2 itself adds on one GPU, copies of the weights, is within the times of part "memory".

Batches double until a video gets no cheaper. Eager steps come first, both networks in turn, so that their ratio is there after
a minute; then CUDA graphs of sampling, which leave the host out; then the compiler, for FIT before the U-Net, whose blocks all
differ and take it minutes. Rounds of a step alternate with a large matrix product, the machine's own peak, so that a slow spell
hits both.
"""

import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.on_gpu.record import Record
from bench.on_gpu.speed_report import STEPS, report
from bench.on_gpu.subjects import SPEED, SharedDraws, Subject, batch_of, evaluation_of, shrunk
from bench.timing import seconds
from model.denoiser import Denoiser
from model.planning.meta_step import Precision, count_step, gathered_dtypes

__all__ = ["report", "run"]

GAIN = 0.03  # by which a doubled batch must make a video cheaper to try the next one
LARGEST = 512
ENOUGH = 8.0  # seconds of one row's rounds, after which three are enough


class Rival:
    """One subject at work on the device."""

    def __init__(self, subject: Subject, device: torch.device, precision: Precision) -> None:
        torch.manual_seed(0)
        self.subject, self.device, self.precision = subject, device, precision
        self.denoiser = Denoiser(subject.model, device)
        with torch.no_grad():
            for p in self.denoiser.parameters():
                if not p.any():  # a U-Net starts with a head of zeros; its gradients would be, and a GPU is faster on zeros
                    p.normal_(std=0.02)
        counted = count_step(Denoiser(subject.model, "meta"), functools.partial(batch_of, subject.model, 1, "meta"), precision)
        training = counted.first_pass + counted.forward + counted.backward + counted.recomputation
        self.flops = {"training": training, "sampling": counted.forward}  # of one video

    def step(self, kind: str, batch: int, graph: bool) -> Callable[[], Any]:
        """A step of so many videos, the same each time, to be called again and again; ready for a CUDA graph or as one."""
        clips = batch_of(self.subject.model, batch, self.device)
        step = functools.partial(self._train, clips, graph) if kind == "training" else self._evaluation(clips)
        return captured(step) if graph else step

    def _train(self, clips: dict[str, Any], graph: bool) -> None:
        if not self.denoiser.training:
            self.denoiser.train()
        # Training draws from a generator for each sample, which a graph cannot capture.
        draws = SharedDraws(len(clips["seed"]), self.device) if graph else None
        with self._autocast():
            terms = self.denoiser(clips, draws)
        self.denoiser.loss(terms, clips).backward()
        self.denoiser.zero_grad(set_to_none=True)

    def _evaluation(self, clips: dict[str, Any]) -> Callable[[], Tensor]:
        x, sigma, told, carried = evaluation_of(self.subject.model, clips)

        def evaluate() -> Tensor:
            if self.denoiser.training:  # to say so each time would take the host some of a single clip's milliseconds
                self.denoiser.eval()
            with torch.no_grad(), self._autocast():
                return self.denoiser.denoise(x, sigma, told, carried)[0]

        return evaluate

    def _autocast(self) -> torch.autocast:
        # Without its cache, which a CUDA graph must not capture; weights are lowered already.
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "amp_bf16", cache_enabled=False)


def captured(step: Callable[[], Any]) -> Callable[[], None]:
    """The step as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay(_kept: Any = step) -> None:  # the graph reads the tensors that the step holds
        graph.replay()

    return replay


@dataclass(frozen=True)
class Bench:
    """Where rows go, and what they are held against."""

    record: Record
    device: torch.device
    sizes: Sequence[int]  # batches to try, in this order
    rounds: int
    end: float  # of the part, by time.monotonic()
    multiply: Callable[[], None]  # a large matrix product
    multiply_flops: int

    @property
    def over(self) -> bool:
        return time.monotonic() > self.end

    def rows(self, subject: Subject, kind: str, mode: str) -> dict[int, dict[str, Any]]:
        """What has been measured, by batch."""
        wanted = {"subject": subject.name, "step": kind, "mode": mode}
        return {row["key"]["batch"]: row for row in self.record.rows if wanted.items() <= row["key"].items()}

    def best(self, subject: Subject, kind: str, mode: str) -> int | None:
        """The batch at which a video was cheapest."""
        rows = {batch: row["ms"] for batch, row in self.rows(subject, kind, mode).items() if "ms" in row}
        return min(rows, key=lambda batch: rows[batch], default=None)

    def sweep(self, rivals: Sequence[Rival], kind: str, mode: str, sizes: Sequence[int]) -> None:
        """Let the batch grow for each rival as long as that helps it."""
        while not self.over:
            sought = [(next_size(self.rows(rival.subject, kind, mode), sizes), rival) for rival in rivals]
            sizes_left = [size for size, _ in sought if size is not None]
            if not sizes_left:
                return
            self.measure([rival for size, rival in sought if size == min(sizes_left)], kind, mode, min(sizes_left))

    def measure(self, rivals: Iterable[Rival], kind: str, mode: str, batch: int) -> None:
        """One row for each rival that has none: rounds of all, or of one after the other where memory is short."""
        ready: dict[Rival, tuple[Callable[[], Any], int | None]] = {}
        for rival in rivals:
            if batch not in self.rows(rival.subject, kind, mode):
                prepared = self._prepare(rival, kind, mode, batch)
                if prepared:
                    ready[rival] = prepared
        room = torch.cuda.get_device_properties(self.device).total_memory / 2 if self.device.type == "cuda" else None
        together = room is None or sum(peak or 0 for _, peak in ready.values()) < room
        for group in [list(ready)] if together else [[rival] for rival in ready]:
            steps: dict[Any, Callable[[], Any]] = {rival: ready[rival][0] for rival in group}
            times = self._rounds({**steps, None: self.multiply})
            product = self.multiply_flops / statistics.median(times[None])
            for rival in group:
                took, peak = statistics.median(times[rival]), ready[rival][1]
                achieved = rival.flops[kind] * batch / took
                self.record.add(
                    key_of(rival, kind, mode, batch),
                    ms=1000 * took / batch,
                    spread=(max(times[rival]) - min(times[rival])) / took,
                    rounds=len(times[rival]),
                    tflop=rival.flops[kind] / 1e12,
                    tflops=achieved / 1e12,
                    of_peak=achieved / product,
                    memory_gib=None if peak is None else peak / 2**30,
                )

    def measure_if_time(self, rival: Rival, kind: str, mode: str, batch: int | None) -> None:
        """One row, if there is time and a batch to measure."""
        if batch and not self.over:
            self.measure([rival], kind, mode, batch)

    def _prepare(self, rival: Rival, kind: str, mode: str, batch: int) -> tuple[Callable[[], Any], int | None] | None:
        """The step, warm, and the bytes that it takes beside the weights; None if memory is too small.

        Whatever else goes wrong is kept as a row too, and raised: the part goes on behind it in a fresh process, for an error of
        CUDA may leave this one unusable.
        """
        cuda = self.device.type == "cuda"
        self.free(rival)
        before = torch.cuda.memory_allocated() if cuda else 0
        begin, failed = time.monotonic(), False
        try:
            step = rival.step(kind, batch, graph="graph" in mode)
            seconds(step, self.device)
        except RuntimeError as error:  # of which running out of memory is one
            if not is_out_of_memory(error):
                self.record.add(key_of(rival, kind, mode, batch), failed=str(error).strip().splitlines()[0][:200])
                raise
            failed = True
        if failed:  # here, where the error and the tensors of its stack are gone
            self.record.add(key_of(rival, kind, mode, batch), out_of_memory=True)
            self.free(rival)
            return None
        if "compiled" in mode and time.monotonic() - begin > 20:
            print(f"  {rival.subject.name}, {kind}: compiled in {time.monotonic() - begin:.0f} s", flush=True)
        return step, torch.cuda.max_memory_allocated() - before if cuda else None

    def free(self, rival: Rival) -> None:
        """Hand back what earlier steps hold, and measure memory anew."""
        rival.denoiser.zero_grad(set_to_none=True)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def _rounds(self, work: Mapping[Any, Callable[[], Any]]) -> dict[Any, list[float]]:
        """Seconds of each; a first round, in which each gets back the memory that the others' start took, does not count."""
        times: dict[Any, list[float]] = {name: [] for name in work}
        begin = time.monotonic()
        for number in range(self.rounds + 1):
            if number > min(3, self.rounds) and time.monotonic() - begin > ENOUGH:
                break
            for name, body in work.items():
                took = seconds(body, self.device)
                if number:
                    times[name].append(took)
        return times


def key_of(rival: Rival, kind: str, mode: str, batch: int) -> dict[str, Any]:
    """A row's key."""
    return {"subject": rival.subject.name, "step": kind, "mode": mode, "batch": batch}


def next_size(rows: Mapping[int, Mapping[str, Any]], sizes: Iterable[int]) -> int | None:
    """The batch to try after those of ``rows``: the next one as long as a video gets cheaper by ``GAIN``, None at the end."""
    best: float | None = None
    for size in sizes:
        row = rows.get(size)
        if row is None:
            return size
        if "ms" not in row or (best is not None and row["ms"] > (1 - GAIN) * best):
            return None
        best = row["ms"]
    return None


def doubled(first: int) -> list[int]:
    """Batches from ``first`` on."""
    sizes = [first]
    while 2 * sizes[-1] <= LARGEST:
        sizes.append(2 * sizes[-1])
    return sizes


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the allocator, a library's or torch's, found too little."""
    told = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in told or "ALLOC_FAILED" in told


def product_of(device: torch.device, dtype: torch.dtype, tiny: bool) -> tuple[Callable[[], None], int]:
    """A large square matrix product, and its FLOPs."""
    size = 256 if tiny else 8192 if device.type == "cuda" else 3072
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    repeats = 10 if device.type == "cuda" else 2

    def multiply() -> None:
        for _ in range(repeats):
            torch.mm(a, b)

    return multiply, repeats * 2 * size**3


def median_seconds(step: Callable[[], Any], device: torch.device, rounds: int = 5) -> float:
    """After two calls that warm up."""
    for _ in range(2):
        seconds(step, device)
    return statistics.median(seconds(step, device) for _ in range(rounds))


def copied_per_second(device: torch.device, tiny: bool) -> float:
    """Bytes, read and written, of a large copy."""
    source = torch.randn(2**16 if tiny else 2**30 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), device)


def run(record: Record, device: torch.device, tiny: bool, seconds_left: float, subjects: Sequence[Subject] = SPEED) -> None:
    """Measure what the record lacks, for so long."""
    end, cuda = time.monotonic() + seconds_left, device.type == "cuda"
    precision: Precision = "amp_bf16" if cuda or tiny else "fp32"  # a CPU would emulate bfloat16
    dtype = torch.bfloat16 if precision == "amp_bf16" else torch.float32
    multiply, flops = product_of(device, dtype, tiny)
    if record.find(peak="matrix product") is None:
        record.add({"peak": "matrix product"}, flops=flops / median_seconds(multiply, device), dtype=str(dtype))
        record.add({"peak": "copy"}, bytes=copied_per_second(device, tiny))
    sizes = doubled(16) if cuda and not tiny else [1, 2] if tiny else [1]
    bench = Bench(record, device, sizes, 2 if tiny else 5 if cuda else 3, end, multiply, flops)
    with ExitStack() as stack:
        rivals = [Rival(shrunk(subject) if tiny else subject, device, precision) for subject in subjects]
        for rival in rivals:
            stack.enter_context(gathered_dtypes(rival.denoiser, precision))
        for kind in STEPS:
            bench.sweep(rivals, kind, "eager", bench.sizes)
        if not cuda:
            return  # no CUDA graphs, and a compiler need not be there
        for rival in rivals:
            _graphs(bench, rival, "eager")
            _single(bench, rival, "eager")
        for rival in rivals:
            if bench.over:
                return
            rival.denoiser.network.compile_blocks()
            for kind in STEPS:  # the compiler makes a version for each batch, so the best one must do
                batch = bench.best(rival.subject, kind, "eager")
                bench.measure_if_time(rival, kind, "compiled", batch)
            _graphs(bench, rival, "compiled")
            bench.measure_if_time(rival, "training", "compiled, graph", bench.best(rival.subject, "training", "compiled"))
        for rival in rivals:
            _single(bench, rival, "compiled")


def _graphs(bench: Bench, rival: Rival, mode: str) -> None:
    """Sampling as a graph, at the batch that is best without."""
    bench.measure_if_time(rival, "sampling", f"{mode}, graph", bench.best(rival.subject, "sampling", mode))


def _single(bench: Bench, rival: Rival, mode: str) -> None:
    """Sampling of a single clip, as it is and as a graph."""
    for how in (mode, f"{mode}, graph"):
        bench.measure_if_time(rival, "sampling", how, 1)
