"""The roofline: closed forms for single kernels, and what fusing leaves of a chain."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from model.planning import roofline
from model.planning.roofline import DEVICES, Device
from model.planning.trace import Operation, trace_sampling

GPU = Device("test", lowered=1e12, full=1e11, bandwidth=1e10)
N = 1024


def trace(evaluate: Callable[..., Any], *shapes: Sequence[int]) -> list[Operation]:
    inputs = [torch.empty(*shape, device="meta") for shape in shapes]
    kept: list[Any] = []  # results must outlive the trace, as a model's do
    return trace_sampling(nn.Linear(1, 1, device="meta"), lambda: kept.append(evaluate(*inputs)), "fp32")


def moved(operations: list[Operation]) -> tuple[int, int]:
    """Bytes eager and fused."""
    return sum(k.bytes for k in roofline.eager(operations)), sum(k.bytes for k in roofline.fused(operations))


def test_a_large_product_is_bound_by_its_operations() -> None:
    (kernel,) = roofline.eager(trace(torch.mm, (4 * N, 4 * N), (4 * N, 4 * N)))
    assert kernel.flops == 2 * (4 * N) ** 3
    assert kernel.seconds(GPU) == pytest.approx(kernel.flops / (1e11 * roofline.REACHED["product"]))


def test_a_thin_product_is_bound_by_its_bytes() -> None:
    (kernel,) = roofline.eager(trace(torch.mm, (N * N, 1), (1, 1)))
    assert kernel.seconds(GPU) == pytest.approx(4 * (2 * N * N + 1) / (1e10 * roofline.REACHED_BANDWIDTH))


def test_a_chain_moves_what_enters_and_leaves_it() -> None:
    operations = trace(lambda x, y: functional.gelu((x + y) * 2), (N, N), (N, N))
    size = 4 * N * N
    assert moved(operations) == (3 * size + 2 * size + 2 * size, 3 * size)
    assert len(roofline.fused(operations)) == 1


def test_what_a_product_reads_later_leaves_the_chain() -> None:
    def evaluate(x: Tensor, w: Tensor) -> Tensor:
        inner = x + 1
        return functional.gelu(inner) + (inner @ w)

    operations = trace(evaluate, (N, N), (N, N))
    size = 4 * N * N
    # The chain x + 1, gelu writes both; the product reads one, and the sum reads the other and the product's result.
    assert moved(operations)[1] == 3 * size + 3 * size + 3 * size


def test_chains_that_share_nothing_are_kernels_of_their_own() -> None:
    assert len(roofline.fused(trace(lambda x, y: (x + 1, y * 2), (N,), (N,)))) == 2
    assert len(roofline.fused(trace(lambda x: (x + 1, x * 2), (N,)))) == 1  # both read x


def test_small_kernels_cost_a_launch_each_on_the_host() -> None:
    kernels = roofline.eager(trace(lambda x: ((x + 1) + 1) + 1, (8,)))
    assert roofline.seconds(kernels, GPU, hosted=True) == pytest.approx(3 * roofline.HOST_LAUNCH)
    assert roofline.seconds(kernels, GPU, hosted=False) == pytest.approx(3 * roofline.KERNEL)


def test_parts_add_up_to_the_device_s_time() -> None:
    kernels = roofline.eager(trace(lambda x, w: (x @ w).relu(), (N, N), (N, N)))
    rows = roofline.by_part(kernels, GPU)
    assert sum(row.seconds for row in rows) == pytest.approx(roofline.seconds(kernels, GPU, hosted=False))
    assert sum(row.bytes for row in rows) == sum(kernel.bytes for kernel in kernels)


def test_later_devices_are_faster() -> None:
    kernels = roofline.eager(trace(lambda x, w: (x @ w).relu(), (N, N), (N, N)))
    times = [roofline.seconds(kernels, device, hosted=False) for device in DEVICES.values()]
    assert times == sorted(times, reverse=True)
