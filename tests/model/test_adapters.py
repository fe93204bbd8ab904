"""LoRA through peft: merged weights in closed form, the published files, and two processes that train adapters."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from model import adapters, checkpoint, finetuning, optimizers, registry
from model.adapters import AdaptersConfig
from model.denoiser import Denoiser
from model.diffusion.sampler import SamplerConfig
from model.ema import EMA, EMAConfig
from model.errors import UserError
from model.finetuning import FinetuneConfig
from model.generate import Request, generate
from model.networks.conditioning import Conditioning
from model.networks.network import Block
from model.optimizers import AdamConfig

LORA = AdaptersConfig(rank=3, alpha=6, targets=("blocks.*.read.*", "*.query_key_value", "stem", "conditioning.text"))
TARGETS = {
    "stem", "conditioning.text",
    *(f"blocks.{block}.read.{name}" for block in (0, 1) for name in ("query", "key_value", "output")),
    *(f"blocks.{block}.layers.{layer}.attention.query_key_value" for block in (0, 1) for layer in (0, 1)),
}  # fmt: skip


def adapted(stage: Any, lora: AdaptersConfig = LORA, random: bool = True) -> Denoiser:
    """A tiny FIT with adapters; ``random`` ones, as if trained."""
    torch.manual_seed(0)
    denoiser = Denoiser(stage)
    nn.init.normal_(denoiser.network.self_conditioning_norm.weight)
    finetuning.prepare(denoiser, FinetuneConfig(lora=lora))
    for name, p in denoiser.named_parameters():
        if random and "lora_B" in name:
            nn.init.normal_(p, std=0.2)
    return denoiser


def weights(denoiser: Denoiser) -> dict[str, torch.Tensor]:
    return checkpoint.gather(dict(denoiser.named_parameters()))


def test_adapters_alone_train_beside_the_layers_that_match(stage: Callable[..., Any]) -> None:
    denoiser = adapted(stage(), random=False)
    trains = {name for name, p in denoiser.network.named_parameters() if p.requires_grad}
    assert trains == {f"{layer}.lora_{part}.default.weight" for layer in TARGETS for part in "AB"}
    plain, given = Denoiser(stage(), "meta"), weights(denoiser)
    plain.load_state_dict({name.replace(".base_layer.", "."): w for name, w in given.items() if "lora" not in name}, assign=True)
    torch.testing.assert_close(clip(denoiser), clip(plain), rtol=0, atol=0)  # B is zero
    # On the meta device the same, so that every process has the same parameters to shard, within the same blocks.
    other = Denoiser(stage(), "meta")
    finetuning.prepare(other, FinetuneConfig(lora=LORA))
    assert [(n, p.shape, p.requires_grad) for n, p in other.named_parameters()] == [
        (n, p.shape, p.requires_grad) for n, p in denoiser.named_parameters()
    ]
    assert all(p.is_meta for p in other.parameters())
    blocks = [module for module in denoiser.modules() if denoiser.network.fsdp_wrap_fn(module)]
    assert len(blocks) == 2 and all("read.query.lora_A.default.weight" in dict(b.named_parameters()) for b in blocks)


def test_merged_weights_are_base_plus_scaled_b_a(stage: Callable[..., Any]) -> None:
    denoiser = adapted(stage())
    given = weights(denoiser)
    before = {name: weight.clone() for name, weight in given.items()}
    merged = adapters.merged(given, denoiser.config, LORA)
    assert merged.keys() == {name for name, _ in Denoiser(stage(), "meta").named_parameters()}
    for name, weight in merged.items():
        layer = name.removesuffix(".weight")
        if layer.removeprefix("network.") in TARGETS and name.endswith("weight"):
            base, a, b = (given[f"{layer}.{part}.weight"].double() for part in ("base_layer", "lora_A.default", "lora_B.default"))
            torch.testing.assert_close(weight.double(), base + 6 / 3 * b @ a, rtol=3e-7, atol=1e-7)
            assert not torch.equal(weight, given[f"{layer}.base_layer.weight"])
        else:
            assert torch.equal(weight, given.get(name, given.get(f"{layer.removesuffix('.bias')}.base_layer.bias")))
    assert all(torch.equal(weight, before[name]) for name, weight in given.items())


def clip(denoiser: Denoiser) -> torch.Tensor:
    """A sample of two clips with guidance, in every way a sampler's."""
    width = denoiser.config.network.text_width
    request = Request(
        text=torch.randn(2, 5, width, generator=torch.Generator().manual_seed(3)),
        text_mask=torch.ones(2, 5, dtype=torch.bool),
        frame_rate=torch.tensor([24.0, 12.0]),
        resolution=torch.tensor([[36.0, 64.0]] * 2),
        generators=[torch.Generator().manual_seed(i) for i in range(2)],
    )
    return generate(denoiser, request, SamplerConfig(steps=4, guidance=2))


def estimate(denoiser: Denoiser) -> torch.Tensor:
    """One evaluation of the network at several noise levels, without dropout."""
    c = denoiser.config.network
    told = Conditioning(
        c_noise=torch.linspace(-1, 1, 3),
        text=torch.randn(3, 5, c.text_width, generator=torch.Generator().manual_seed(3)),
        text_mask=torch.ones(3, 5, dtype=torch.bool),
        frame_rate=torch.tensor([24.0, 12.0, float("inf")]),
        resolution=torch.tensor([[36.0, 64.0]] * 3),
    )
    x = torch.randn(3, c.size[0], 3, *c.size[1:], generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        return denoiser.eval().denoise(x, torch.tensor([0.1, 1.0, 30.0]), told, None)[0]


def test_what_is_published_samples_as_the_adapted_network_does(stage: Callable[..., Any], tmp_path: Path) -> None:
    denoiser = adapted(stage())
    given = weights(denoiser)
    plain = Denoiser(stage(), "meta")
    plain.load_state_dict(adapters.merged(given, denoiser.config, LORA), assign=True)
    torch.testing.assert_close(estimate(plain), estimate(denoiser), rtol=0, atol=1e-5)
    torch.testing.assert_close(clip(plain), clip(denoiser), rtol=0, atol=1e-4)  # of 14 evaluations
    base = {name.replace(".base_layer.", "."): weight for name, weight in given.items() if "lora" not in name}
    plain.load_state_dict(base, assign=True)
    assert (clip(plain) - clip(denoiser)).abs().max() > 1e-2
    # peft reads its own files back, onto the base.
    adapters.write(tmp_path / "adapter", given, LORA)
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    PeftModel.from_pretrained(nn.ModuleDict({"network": plain.network}), str(tmp_path / "adapter"))
    assert all(torch.equal(weight, given[name]) for name, weight in plain.named_parameters())
    torch.testing.assert_close(clip(plain), clip(denoiser), rtol=0, atol=0)


@pytest.mark.parametrize("recompute", [False, True])
def test_training_leaves_the_base_to_the_bit(stage: Callable[..., Any], clips: Callable[..., Any], recompute: bool) -> None:
    network = replace(stage().network, checkpoint_blocks=recompute)
    denoiser = adapted(stage(network=network), replace(LORA, dropout=0.2), random=False)
    start = {name: weight.clone() for name, weight in weights(denoiser).items()}
    optimizer, ema = optimizers.build(denoiser.parameters(), AdamConfig(lr=1e-2)), EMA(EMAConfig(half_life=2))
    state: Any = SimpleNamespace(model=denoiser, timestamp=SimpleNamespace(batch=0))
    ema.before_load(state, None)  # type: ignore[arg-type]
    for step in range(3):
        denoiser.loss(denoiser(clips(4, step)), {}).backward()
        optimizer.step()
        optimizer.zero_grad()
        state.timestamp.batch += 1
        ema.batch_end(state, None)  # type: ignore[arg-type]
    averaged = ema.averaged(denoiser)
    for name, p in denoiser.named_parameters():
        assert torch.equal(p, start[name]) == ("lora" not in name), name
        assert torch.equal(averaged[name], start[name]) == ("lora" not in name), name


def test_blocks_with_adapters_compile_whole(stage: Callable[..., Any], clips: Callable[..., Any]) -> None:
    denoiser = adapted(stage(self_conditioning=0.0))
    expected = denoiser(clips(2)).loss
    denoiser.network.compile_blocks(backend="eager")  # fullgraph: an operation that cannot be traced is an error
    torch.testing.assert_close(denoiser(clips(2)).loss, expected)
    assert any(isinstance(module, Block) for module in denoiser.modules())
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("lora", "told"),
    [
        (replace(LORA, targets=("blocks.*.red.*",)), r"^finetune.lora.targets: .*the nearest are blocks.1.read"),
        (replace(LORA, targets=("head_norm",)), "^finetune.lora.targets: 'head_norm' matches no name"),
        (replace(LORA, targets=()), "nothing is left to train"),
    ],
)
def test_targets_that_cannot_be_meant_are_told(stage: Callable[..., Any], lora: AdaptersConfig, told: str) -> None:
    with pytest.raises(UserError, match=told):
        finetuning.prepare(Denoiser(stage(), "meta"), FinetuneConfig(lora=lora))


def test_what_the_published_model_lacks_cannot_be_adapted(stage: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="head.bias, one of 1 parameters that the published model lacks"):
        finetuning.prepare(Denoiser(stage(), "meta"), FinetuneConfig(lora=LORA), ["network.head.bias"])


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: AdaptersConfig(rank=0), "rank and alpha must be positive, got 0 and 16"),
        (lambda: AdaptersConfig(dropout=1.0), "dropout must be in"),
        (lambda: FinetuneConfig(("head.*",), (), LORA), "trainable and freeze must be left out"),
    ],
)
def test_impossible_settings_are_named(make: Callable[[], Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make()


LORA_RUN = "finetune={lora: {rank: 2, alpha: 4, dropout: 0.1, targets: [blocks.*, head]}}"


@pytest.mark.slow
def test_two_processes_train_adapters_resume_and_publish(tmp_path: Path, training: Any, published_base: Path) -> None:
    run = training(tmp_path, steps=6, every=3)
    adam = "optimizer={kind: adam, lr: 2e-2}"
    overrides = (f"initialise_from={published_base}", LORA_RUN, adam, "ema.half_life=2")
    run.finish(run.start(*overrides))
    first = run.weights()
    own = load_file(run.folder / "tiny/model-step-0000006/adapter/adapter_model.safetensors")
    run.take_back(to=3)
    run.finish(run.start(*overrides))
    assert "goes on from" in run.log and run.log.count("trains ") == 2
    assert all(torch.equal(weight, first[name]) for name, weight in run.weights().items())

    folder = run.folder / "tiny/model-step-0000006"
    published = checkpoint.load(registry.fetch("models:/tiny@newest", f"sqlite:///{tmp_path}/mlflow.db")).denoiser
    base = checkpoint.load(published_base).denoiser
    assert (clip(published) - clip(base)).abs().max() > 1e-3
    for name, weight in base.named_parameters():
        adapts = name.endswith("weight") and f"base_model.model.{name.removesuffix('weight')}lora_A.weight" in own
        assert torch.equal(weight, first[name]) == (not adapts), name
    again = load_file(folder / "adapter/adapter_model.safetensors")
    assert own and own.keys() == again.keys() and all(torch.equal(own[name], again[name]) for name in own)
    PeftModel.from_pretrained(nn.ModuleDict({"network": base.network}), str(folder / "adapter"))  # beside the weights, not merged
    torch.testing.assert_close(estimate(published), estimate(base), rtol=0, atol=1e-5)
