"""The meta run against a real one on the CPU, other counters and closed forms."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from composer.distributed.fsdp2_utils import generate_composer_model_policy
from composer.models import ComposerModel
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from model.codec import PixelCodecConfig
from model.denoiser import Denoiser, ModelConfig, UpsamplerConfig
from model.networks.fit.config import FITConfig
from model.networks.unet.config import UNetConfig
from model.planning.meta_step import GPUSemantics, Meter, StepCount, count_step, flop_counter, fsdp_units

aten = torch.ops.aten

# No dropout: the CPU's keeps floats where a GPU's keeps a mask.
SIZES: dict[str, Any] = {
    "size": (4, 32, 32), "patch": (1, 4, 4), "group": (4, 4, 4), "patch_width": 64, "latent_tokens": 64, "latent_width": 96,
    "blocks": 2, "global_layers": 2, "patch_head_width": 32, "latent_head_width": 32, "conditioning_width": 64, "text_width": 48,
    "dropout": 0.0,
}  # fmt: skip
TEXT_TOKENS = 16


def denoiser(device: str, **network: Any) -> Denoiser:
    upsampler = UpsamplerConfig(factor=4) if network.get("upsampler") else None
    codec = PixelCodecConfig(height=28, width=32, pad_bottom=4)
    return Denoiser(ModelConfig(codec=codec, network=FITConfig(**(SIZES | network)), upsampler=upsampler), device)


def unet(device: str, checkpoint_blocks: bool = False) -> Denoiser:
    network = UNetConfig(
        size=(4, 32, 32), base_width=32, multipliers=(1, 2), residual_blocks=1, attention_factors=(2,), head_width=32,
        conditioning_width=64, text_width=48, dropout=0.0, checkpoint_blocks=checkpoint_blocks,
    )  # fmt: skip
    codec = PixelCodecConfig(height=28, width=32, pad_bottom=4)
    return Denoiser(ModelConfig(codec=codec, network=network, self_conditioning=0), device)


def video_batch(samples: int, device: str) -> dict[str, Any]:
    with torch.device(device):
        return {
            "video": torch.zeros(samples, 4, 3, 28, 32),
            "text": torch.zeros(samples, TEXT_TOKENS, 48, dtype=torch.bfloat16),
            "text_mask": torch.ones(samples, TEXT_TOKENS, dtype=torch.bool),
            "seed": list(range(samples)),
            "frame_rate": torch.full((samples,), 24.0),
            "resolution": torch.full((samples, 2), 64.0),
        }


class Residual(nn.Module):
    """Group norm, convolution and attention over places, optionally recomputed."""

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.recompute = recompute
        self.norm = nn.GroupNorm(4, 32)
        self.convolution = nn.Conv3d(32, 32, 3, padding=1)
        self.query_key_value = nn.Linear(32, 96)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._compute, x, use_reentrant=False) if self.recompute else self._compute(x)

    def _compute(self, x: Tensor) -> Tensor:
        x = x + self.convolution(functional.silu(self.norm(x)))
        q, k, v = self.query_key_value(x.flatten(2).transpose(1, 2))[:, None].chunk(3, dim=-1)
        return x + functional.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)


class Convolutions(ComposerModel):
    """No transformer and no self-conditioning: the counting knows neither."""

    def __init__(self, device: str, checkpoint_blocks: bool) -> None:
        super().__init__()
        with torch.device(device):
            self.network = nn.Sequential(
                nn.Conv3d(3, 32, 3, stride=2, padding=1), *(Residual(checkpoint_blocks) for _ in range(3))
            )
        self.network.fsdp_wrap_fn = lambda module: isinstance(module, Residual)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.network(batch["video"].transpose(1, 2))

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return (outputs.float() ** 2).mean()


BUILDERS: dict[str, Callable[[str], nn.Module]] = {
    "fit": lambda device: denoiser(device),
    "fit, checkpointed": lambda device: denoiser(device, checkpoint_blocks=True),
    "fit, upsampler": lambda device: denoiser(device, upsampler=True, position="factorised"),
    "unet": lambda device: unet(device),
    "unet, checkpointed": lambda device: unet(device, checkpoint_blocks=True),
    "convolutions": lambda device: Convolutions(device, False),
    "convolutions, checkpointed": lambda device: Convolutions(device, True),
}


@pytest.fixture(params=BUILDERS)
def build(request: pytest.FixtureRequest) -> Callable[[str], nn.Module]:
    return BUILDERS[request.param]


def total(count: StepCount) -> int:
    return count.first_pass + count.forward + count.backward + count.recomputation


def test_flops_equal_those_that_torch_counts_on_a_real_step(build: Callable[[str], nn.Module]) -> None:
    counted = count_step(build("meta"), lambda: video_batch(2, "meta"), "fp32")
    model, batch = build("cpu"), video_batch(2, "cpu")
    fused = aten._scaled_dot_product_flash_attention_for_cpu  # torch's counter leaves it out
    fused_backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    attention = {
        fused: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        fused_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g, q, k, v),
    }
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        model.loss(model(batch), batch).backward()
    assert total(counted) == pytest.approx(counter.get_total_flops(), rel=0.01)


# On a GPU, as in the count, a group norm keeps a copy of channels-last input, which the CPU's kernel does without.
LIKE_THE_CPU = {name: build for name, build in BUILDERS.items() if name != "unet"}


@pytest.mark.parametrize("build", LIKE_THE_CPU.values(), ids=LIKE_THE_CPU)
def test_kept_bytes_are_what_autograd_saves_on_a_real_step(build: Callable[[str], nn.Module]) -> None:
    counted = count_step(build("meta"), lambda: video_batch(4, "meta"), "fp32")
    model, batch = build("cpu"), video_batch(4, "cpu")
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    inputs = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in batch.values() if isinstance(t, Tensor)}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        objective = model.loss(model(batch), batch)
    assert counted.kept == pytest.approx(sum((saved | inputs).values()), rel=0.01)
    del objective


def test_peak_is_what_the_cpu_allocates_in_a_real_step(build: Callable[[str], nn.Module]) -> None:
    counted = count_step(build("meta"), lambda: video_batch(4, "meta"), "fp32")
    model = build("cpu")
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        batch = video_batch(4, "cpu")
        model.loss(model(batch), batch).backward()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert counted.peak == pytest.approx(peak, rel=0.1)


def test_flops_equal_the_closed_form() -> None:
    c = FITConfig(**SIZES)
    n, m, g, p, z, w = c.patch_tokens, c.latent_tokens, c.groups, c.patch_width, c.latent_width, c.conditioning_width
    length, pixels, features = TEXT_TOKENS + 4, 3 * 4 * 4, 128

    def attention(queries: int, context: int, width: int, context_width: int, groups: int = 1) -> tuple[int, int]:
        """Matrix products with weights, and those of queries with keys and of scores with values."""
        inner = min(width, context_width)
        return 4 * queries * width * inner + 4 * context * context_width * inner, 4 * queries * context * inner // groups

    def feed_forward(tokens: int, width: int) -> tuple[int, int]:
        return 16 * tokens * width**2, 0

    write = [attention(n, m, p, z, g), feed_forward(n, p)]
    block = [attention(m, length, z, w), feed_forward(m, z), attention(m, n, z, p, g), feed_forward(m, z)]
    block += c.global_layers * [attention(m, m, z, z), feed_forward(m, z)]
    weights, scores = (sum(part[i] for part in block) for i in (0, 1))
    write_weights, write_scores = (sum(part[i] for part in write) for i in (0, 1))
    from_inputs = 2 * TEXT_TOKENS * c.text_width * w + 4 * 2 * features * w + 2 * n * pixels * p  # without gradient of inputs
    outside = from_inputs + 4 * 2 * w * w + feed_forward(m, z)[0]
    head = 2 * n * p * pixels
    linear, fused = outside + head + c.blocks * (weights + write_weights), c.blocks * (scores + write_scores)

    counted = count_step(denoiser("meta"), lambda: video_batch(3, "meta"), "amp_bf16")
    assert counted.forward == 3 * (linear + fused)
    assert counted.first_pass == counted.forward - 3 * (write_weights + write_scores + head)
    assert counted.backward == 3 * (2 * linear - from_inputs + 5 * fused // 2)  # fused attention computes the scores anew
    assert counted.recomputation == 0


def test_checkpointing_shows() -> None:
    plain = count_step(denoiser("meta"), lambda: video_batch(4, "meta"), "amp_bf16")
    recomputed = count_step(denoiser("meta", checkpoint_blocks=True), lambda: video_batch(4, "meta"), "amp_bf16")
    assert (plain.first_pass, plain.forward, plain.backward) == (recomputed.first_pass, recomputed.forward, recomputed.backward)
    assert 0.5 * plain.forward < recomputed.recomputation < plain.forward
    assert recomputed.kept < recomputed.peak < plain.peak


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
def test_memory_is_linear_in_the_batch(precision: Any) -> None:
    one, two, five = (count_step(denoiser("meta"), lambda n=n: video_batch(n, "meta"), precision).peak for n in (1, 2, 5))
    assert five - one == pytest.approx(4 * (two - one), rel=0.01)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("checkpoint_blocks", [False, True])
def test_peak_is_what_a_gpu_allocates(checkpoint_blocks: bool) -> None:
    network = {"dropout": 0.1, "checkpoint_blocks": checkpoint_blocks}
    counted = count_step(denoiser("meta", **network), lambda: video_batch(64, "meta"), "amp_bf16")
    model = denoiser("cuda", **network).to(torch.bfloat16)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    before = torch.cuda.memory_allocated()
    batch = video_batch(64, "cuda")
    with torch.autocast("cuda", torch.bfloat16):
        objective = model.loss(model(batch), batch)
    objective.backward()
    assert counted.peak == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.15)


def test_the_meter_follows_storages() -> None:
    made_before = torch.empty(1000, device="meta")
    meter = Meter()
    meter.ignore([made_before])
    with meter:
        kept = torch.empty(10, 10, device="meta")  # 400 bytes
        views = [kept.t(), made_before[::2], kept.view(-1)]
        dropped = kept + 1  # 400
        assert meter.live == 800
        del dropped
        assert meter.live == 400
        half = kept.to(torch.bfloat16)  # 200
        kept.add_(1)
        assert meter.live == 600
        del kept
        assert meter.live == 600, "its views keep the storage"
        del views
        assert meter.live == 200
    assert (meter.live, meter.peak) == (200, 800)
    assert half.dtype == torch.bfloat16


def test_the_meter_sees_what_autograd_alone_holds() -> None:
    x = torch.empty(64, 32, device="meta", requires_grad=True)
    meter = Meter()
    meter.ignore([x])
    with meter:
        y = functional.gelu(functional.gelu(x))  # the inner result lives on in the graph
        assert meter.live == 2 * 64 * 32 * 4
        y.sum().backward()
    del y
    assert meter.live == 64 * 32 * 4, "the gradient of x"


def saved_bytes(function: Callable[..., Tensor], *inputs: Tensor) -> int:
    """Of tensors made while ``function`` runs under bfloat16 autocast, those that live when its result is taken away."""
    meter = Meter()
    meter.ignore(inputs)
    with meter, GPUSemantics(torch.bfloat16):
        result = function(*inputs)
        return meter.live - result.untyped_storage().nbytes()


def parameter(*shape: int) -> Tensor:
    return torch.empty(*shape, device="meta", dtype=torch.bfloat16, requires_grad=True)


def test_normalisation_keeps_float32_and_linear_layers_bfloat16() -> None:
    # Norms: their input in float32, mean and deviation per row, weight and bias; linear layer: its input in bfloat16.
    def layer(x: Tensor, scale: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
        return functional.linear(functional.layer_norm(x, (64,), scale, bias), weight)

    kept = saved_bytes(layer, parameter(100, 64), parameter(64), parameter(64), parameter(32, 64))
    assert kept == 100 * 64 * 4 + 2 * 100 * 4 + 2 * 64 * 4 + 100 * 64 * 2


def test_dropout_keeps_a_byte_per_element() -> None:
    assert saved_bytes(lambda x: functional.dropout(x, 0.1), parameter(100, 64)) == 100 * 64
    assert saved_bytes(lambda x: functional.dropout(x, 0.1, training=False), parameter(100, 64)) <= 0


@pytest.mark.parametrize("masked", [False, True])
def test_attention_keeps_no_scores(masked: bool) -> None:
    q, k, v = parameter(2, 4, 512, 64), parameter(2, 4, 300, 64), parameter(2, 4, 300, 64)
    mask = torch.empty(2, 1, 1, 300, dtype=torch.bool, device="meta") if masked else None
    kept = saved_bytes(lambda *inputs: functional.scaled_dot_product_attention(*inputs, attn_mask=mask), q, k, v)
    log_sums = 2 * 4 * 512 * 4
    assert log_sums <= kept < log_sums + 4096


def test_units_are_those_that_composer_wraps(build: Callable[[str], nn.Module]) -> None:
    model = build("meta")
    wrapped = generate_composer_model_policy(model)._run_policy(model, set(), {})
    assert set(fsdp_units(model)) == set(wrapped)
    assert len(fsdp_units(model)) == len(wrapped) > 2


@pytest.mark.parametrize("model", [denoiser("meta"), unet("meta")], ids=["fit", "unet"])
def test_blocks_are_units_unless_told_otherwise(model: Denoiser) -> None:
    assert len(fsdp_units(model)) > 2
    model.network.shard_blocks = False
    assert fsdp_units(model) == [model.network]
    assert generate_composer_model_policy(model)._run_policy(model, set(), {}).keys() == {model.network}


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_a_convolution_in_groups_is_counted_by_its_multiplications(groups: int) -> None:
    """Backward it does twice the forward's: once for its input, once for its weights."""
    layer = nn.Conv3d(8, 8, 3, padding=1, groups=groups)
    x = torch.randn(2, 8, 4, 6, 6, requires_grad=True)
    forward = 2 * (8 // groups * 27) * x.numel()
    with flop_counter() as counted:
        layer(x).sum().backward()
    assert counted.get_total_flops() == 3 * forward
