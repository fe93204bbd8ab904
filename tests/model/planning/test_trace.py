"""Traced operations: counts and sizes against closed forms and torch's own counter, and the parts that they belong to."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from model.codec import PixelCodecConfig
from model.denoiser import Denoiser, ModelConfig
from model.networks.catalogue import NetworkConfig
from model.networks.fit.config import FITConfig
from model.networks.unet.config import UNetConfig
from model.optimizers import AdamConfig, build
from model.planning.meta_step import count_step
from model.planning.trace import Operation, trace_sampling, trace_step, trace_update

LOWERED, FULL = 2, 4  # bytes


class Feed(nn.Module):
    """A model in two named parts, whose operations can be counted by hand."""

    def __init__(self) -> None:
        super().__init__()
        with torch.device("meta"):
            self.network = nn.ModuleDict({"first": nn.Linear(16, 32, bias=False), "second": nn.Linear(32, 8, bias=False)})

    def forward(self, batch: Tensor) -> Tensor:
        return self.network["second"](functional.gelu(self.network["first"](batch)))

    def loss(self, outputs: Tensor, batch: Tensor) -> Tensor:
        return outputs.sum()


def clips(c: ModelConfig, samples: int) -> dict[str, Any]:
    frames, _, width = c.network.size
    with torch.device("meta"):
        return {
            "video": torch.empty(samples, frames, 3, c.codec.height, width),
            "text": torch.empty(samples, 5, c.network.text_width, dtype=torch.bfloat16),
            "text_mask": torch.empty(samples, 5, dtype=torch.bool),
            "frame_rate": torch.empty(samples),
            "resolution": torch.empty(samples, 2),
            "seed": list(range(samples)),
        }


@pytest.fixture
def stage(tiny: FITConfig, tiny_unet: UNetConfig) -> Callable[..., ModelConfig]:
    """``stage(kind)``: a small stage with a FIT or a U-Net."""

    def make(kind: str, **changes: Any) -> ModelConfig:
        network: NetworkConfig = replace(tiny if kind == "fit" else tiny_unet, **changes)
        _, height, width = network.size
        codec = PixelCodecConfig(height=height - 2, width=width, pad_bottom=2)
        return ModelConfig(codec=codec, network=network, self_conditioning=0.9 if kind == "fit" else 0.0)

    return make


def totals(operations: list[Operation], key: Callable[[Operation], Any]) -> Counter[Any]:
    found: Counter[Any] = Counter()
    for operation in operations:
        found[key(operation)] += operation.flops
    return found


def test_products_have_their_closed_forms() -> None:
    operations = trace_step(Feed(), lambda: torch.empty(64, 16, device="meta"), "fp32")
    products = {(o.part, o.phase): o for o in operations if o.kind == "product" and o.phase == "forward"}
    first, second = products["first", "forward"], products["second", "forward"]
    assert (first.flops, second.flops) == (2 * 64 * 16 * 32, 2 * 64 * 32 * 8)
    assert sorted(first.reads.values()) == sorted([FULL * 64 * 16, FULL * 16 * 32])
    assert list(first.writes.values()) == [FULL * 64 * 32]
    assert not first.lowered
    (gelu,) = (o for o in operations if o.name == "gelu")
    assert gelu.bytes == 2 * FULL * 64 * 32
    assert gelu.launches == 1


def test_gradients_belong_to_the_part_that_they_are_of() -> None:
    operations = trace_step(Feed(), lambda: torch.empty(64, 16, device="meta"), "fp32")
    backward = totals([o for o in operations if o.phase == "backward"], lambda o: o.part)
    assert backward["first"] == 2 * 64 * 16 * 32  # the batch itself needs no gradient
    assert backward["second"] == 2 * (2 * 64 * 32 * 8)


def test_autocast_lowers_products_and_shows_its_casts() -> None:
    operations = trace_step(Feed(), lambda: torch.empty(64, 16, device="meta"), "amp_bf16")
    first = next(o for o in operations if o.kind == "product")
    assert first.lowered
    assert list(first.writes.values()) == [LOWERED * 64 * 32]
    cast = next(o for o in operations if o.name == "_to_copy")
    assert (list(cast.reads.values()), list(cast.writes.values())) == ([FULL * 64 * 16], [LOWERED * 64 * 16])


def test_fit_s_layers_neither_cast_nor_keep_masks(stage: Callable[..., ModelConfig]) -> None:
    """Around each norm autocast would put four casts. What is left are those of what enters and leaves the network."""
    c = stage("fit", dropout=0.1)
    operations = trace_step(Denoiser(c, "meta"), lambda: clips(c, 2), "amp_bf16")
    casts = Counter(o.part for o in operations if o.name == "_to_copy")
    assert not [part for part in casts if part.startswith("blocks.")]
    assert Counter(o.name for o in operations)["native_dropout"] == 2 * 2 * 2  # blocks, layers, passes


def test_views_and_empty_memory_are_no_operations() -> None:
    def evaluate() -> None:
        x = torch.empty(4, 6, device="meta")
        x.view(6, 4).transpose(0, 1).unsqueeze(0)
        x[1:3].expand(2, 2, 6)

    assert trace_sampling(nn.Linear(1, 1, device="meta"), evaluate, "fp32") == []


def test_what_is_written_in_place_counts_as_written() -> None:
    weights = [torch.empty(8, device="meta"), torch.empty(3, 5, device="meta")]
    (operation,) = trace_update(lambda: torch._foreach_mul_(weights, 2.0), weights)
    assert sum(operation.reads.values()) == sum(operation.writes.values()) == FULL * (8 + 15)


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
@pytest.mark.parametrize(("kind", "recompute"), [("fit", False), ("fit", True), ("unet", False), ("unet", True)])
def test_floating_point_operations_are_those_of_the_meter(
    kind: str, recompute: bool, precision: Any, stage: Callable[..., ModelConfig]
) -> None:
    c = stage(kind, checkpoint_blocks=recompute)
    operations = trace_step(Denoiser(c, "meta"), lambda: clips(c, 2), precision)
    counted = count_step(Denoiser(c, "meta"), lambda: clips(c, 2), precision)
    by_phase = totals(operations, lambda o: o.phase)
    assert by_phase["first pass"] == counted.first_pass
    assert by_phase["forward"] == counted.forward
    assert by_phase["backward"] == counted.backward
    assert by_phase["recomputation"] == counted.recomputation
    assert (counted.recomputation > 0) == recompute


@pytest.mark.parametrize("recompute", [False, True])
def test_each_part_of_fit_computes_twice_as_much_backward(recompute: bool, stage: Callable[..., ModelConfig]) -> None:
    """As each matrix product has two gradients; attention's own operations, which have others, are left out."""
    c = stage("fit", checkpoint_blocks=recompute)
    operations = trace_step(Denoiser(c, "meta"), lambda: clips(c, 2), "amp_bf16")
    products = totals([o for o in operations if o.kind == "product"], lambda o: (o.part, o.phase))
    parts = {part for part, phase in products if part.startswith("blocks.")}
    assert {"blocks.read", "blocks.write_feed_forward", "blocks.layers.attention", "blocks.layers.feed_forward"} <= parts
    for part in parts:
        assert products[part, "backward"] == 2 * products[part, "forward"] > 0, part
        again = products[part, "forward"] if recompute else 0
        if part == "blocks.write_feed_forward":  # recomputation stops once all that the gradients ask for is there: before
            again //= 2  # the last of its two products
        assert products[part, "recomputation"] == again, part


def test_products_are_as_many_as_a_real_step_makes(stage: Callable[..., ModelConfig]) -> None:
    c = stage("fit")
    traced = Counter(o.name for o in trace_step(Denoiser(c, "meta"), lambda: clips(c, 2), "fp32"))
    denoiser = Denoiser(c)
    batch = {name: value if name == "seed" else torch.ones_like(value, device="cpu") for name, value in clips(c, 2).items()}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
        denoiser.loss(denoiser(batch), batch).backward()
    made = {row.key: row.count for row in record.key_averages()}
    for name in ("mm", "addmm", "native_layer_norm", "native_layer_norm_backward", "gelu", "gelu_backward"):
        assert traced[name] == made[f"aten::{name}"], name


def test_an_update_of_lists_is_launched_by_chunks() -> None:
    weights = [nn.Parameter(torch.empty(1000, 1000, device="meta")) for _ in range(100)]
    for weight in weights:
        weight.grad = torch.empty_like(weight)
    optimizer = build(weights, AdamConfig())
    operations = trace_update(optimizer.step, weights)
    fused = next(o for o in operations if o.name == "_fused_adamw_")
    assert fused.launches == 5  # 100 x 16 chunks of 65,536 numbers, 320 to a launch
    ratios = [torch.empty((), device="meta") for _ in weights]
    plain = [weight.detach() for weight in weights]
    (slow,) = trace_update(lambda: torch._foreach_addcmul_(plain, plain, ratios), plain)
    assert slow.launches == 100  # lists of other shapes leave ATen's fast path
