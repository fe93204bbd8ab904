"""Training part of a published model: what is frozen stays to the bit, from the first step to the published weights."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file

from model import checkpoint, config, finetuning, optimizers
from model.denoiser import Denoiser
from model.ema import EMA, EMAConfig
from model.errors import UserError
from model.faults import FaultsConfig, StepGuard
from model.finetuning import FinetuneConfig, Share
from model.optimizers import AdamConfig, LAMBConfig
from model.train import TrainConfig

PART = FinetuneConfig(("blocks.*.read.*", "head.*"), ("blocks.0.*", "head.bias"))


@pytest.fixture
def denoiser(stage) -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(stage())


def trained(denoiser: Denoiser) -> set[str]:
    return {name for name, p in denoiser.network.named_parameters() if p.requires_grad}


def test_what_matches_trains(denoiser: Denoiser) -> None:
    told = finetuning.prepare(denoiser, PART)
    names = {"query_norm.weight", "query_norm.bias", "context_norm.weight", "context_norm.bias"}
    names |= {"query.weight", "key_value.weight", "output.weight"}
    assert trained(denoiser) == {"head.weight", *(f"blocks.1.read.{name}" for name in names)}
    # Latents of 24 read patches of 16: norms, query 24x16, key and value 16x32, output 16x24; head 16x12.
    assert told.trained == 2 * 24 + 2 * 16 + 24 * 16 + 16 * 32 + 16 * 24 + 16 * 12
    assert told.total == sum(p.numel() for p in denoiser.parameters())
    assert str(Share(1500, 60_000)) == "trains 1,500 of 60,000 parameters (2.50%)"


def test_what_was_measured_never_trains(stage, tiny) -> None:
    denoiser = Denoiser(stage(network=replace(tiny, text_standardised=True)))
    standard = {"conditioning.standard.mean", "conditioning.standard.spread"}
    finetuning.prepare(denoiser, FinetuneConfig())
    assert set(dict(denoiser.network.named_parameters())) - trained(denoiser) == standard


@pytest.mark.parametrize(
    ("part", "told"),
    [
        (
            FinetuneConfig(("blok.*",)),
            r"^finetune.trainable: 'blok.\*' matches no name in the network; the nearest are .*blocks.\*",
        ),
        (FinetuneConfig(freeze=("hed.weight",)), "^finetune.freeze: 'hed.weight' .*nearest are head.weight"),
        (FinetuneConfig(("network.head.*",)), r"nearest are .*head.\*"),
        (FinetuneConfig(("head.*",), ("*",)), "^finetune: nothing is left to train"),
        (FinetuneConfig(()), "^finetune: nothing is left to train"),
    ],
)
def test_what_cannot_be_meant_is_told(denoiser: Denoiser, part: FinetuneConfig, told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        finetuning.prepare(denoiser, part)
    assert "\n" not in str(error.value)


def test_what_the_published_model_lacks_may_not_stay_random(denoiser: Denoiser) -> None:
    new = ["network.head.weight", "network.head.bias"]
    with pytest.raises(UserError, match="head.bias, one of 1 parameters that the published model lacks, would stay random"):
        finetuning.prepare(denoiser, PART, new)
    finetuning.prepare(denoiser, replace(PART, freeze=()), new)


@pytest.mark.parametrize("optimizer", [LAMBConfig(weight_decay=0.1), AdamConfig(weight_decay=0.1)])
@pytest.mark.parametrize("recompute", [False, True])
def test_what_is_frozen_stays_to_the_bit(
    stage, clips: Callable[..., Any], tmp_path: Path, optimizer: Any, recompute: bool
) -> None:
    torch.manual_seed(0)
    denoiser = Denoiser(stage(network=replace(stage().network, checkpoint_blocks=recompute)))
    start = {name: p.detach().clone() for name, p in denoiser.named_parameters()}
    finetuning.prepare(denoiser, PART)
    steps, ema = optimizers.build(denoiser.parameters(), optimizer), EMA(EMAConfig(half_life=2))
    guard = StepGuard(FaultsConfig(), 0.5, (ema,), tmp_path)
    state: Any = SimpleNamespace(model=denoiser, timestamp=SimpleNamespace(batch=0))
    ema.before_load(state, None)  # type: ignore[arg-type]
    for _ in range(3):
        state.batch = {**clips(4), "key": list("abcd")}
        guard.before_train_batch(state, None)  # type: ignore[arg-type]
        state.outputs = denoiser(state.batch)
        guard.after_loss(state, None)  # type: ignore[arg-type]
        denoiser.loss(state.outputs, state.batch).backward()
        guard.after_train_batch(state, None)  # type: ignore[arg-type]
        norm = torch.stack([p.grad.norm() for p in denoiser.parameters() if p.grad is not None]).norm()
        assert float(norm) == pytest.approx(min(0.5, guard.gradient_norm), rel=1e-4)
        steps.step()
        steps.zero_grad()
        state.timestamp.batch += 1
        ema.batch_end(state, None)  # type: ignore[arg-type]
    trains = {f"network.{name}" for name in trained(denoiser)}
    assert ema.weights.keys() == trains and len(steps.state) == len(trains)  # no memory for what does not train
    averaged = ema.averaged(denoiser)
    assert averaged.keys() == start.keys()
    for name, p in denoiser.named_parameters():
        assert torch.equal(p, start[name]) == (name not in trains), name
        assert torch.equal(averaged[name], start[name]) == (name not in trains), name
    with ema.swapped(denoiser):
        assert all(torch.equal(p, averaged[name]) == (name not in trains) for name, p in denoiser.named_parameters())


def test_it_needs_a_published_model(tmp_path: Path, training: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="which initialise_from must name"):
        config.load(TrainConfig, training(tmp_path).write_yaml(), ["finetune={trainable: [head.*]}"])


@pytest.mark.slow
def test_two_processes_train_a_part_resume_and_publish(
    tmp_path: Path, training: Callable[..., Any], published_base: Path
) -> None:
    run = training(tmp_path, steps=6, every=3)
    part = "finetune={trainable: [conditioning.*, blocks.1.*, head.*], freeze: [head.bias]}"
    overrides = (f"initialise_from={published_base}", part, "model.network.checkpoint_blocks=true", "faults.policy=skip")
    run.finish(run.start(*overrides))
    first = run.weights()
    run.take_back(to=3)
    run.finish(run.start(*overrides))
    assert "goes on from" in run.log
    again = run.weights()
    changed = "finetune={trainable: [conditioning.*, blocks.*, head.*], freeze: [head.bias]}"
    assert run.start(*overrides, changed).wait(timeout=120) == 2
    told = [line for line in run.log.splitlines() if line.startswith("error:")]
    assert "network.blocks.0." in told[0] and "does not train in the checkpoint and trains, " in told[0]
    assert "Traceback" not in run.log
    start = load_file(published_base / checkpoint.WEIGHTS)
    assert first.keys() == start.keys()
    for name, weight in first.items():
        assert torch.equal(weight, again[name]), name
        trains = name.startswith(("network.conditioning.", "network.blocks.1.", "network.head.w"))
        trains = trains and not name.startswith("network.conditioning.standard.")  # measured, never trained
        assert torch.equal(weight, start[name]) == (not trains), name
    sizes = {name: weight.numel() for name, weight in first.items()}
    share = Share(sum(size for name, size in sizes.items() if not torch.equal(first[name], start[name])), sum(sizes.values()))
    assert run.log.count(str(share)) == 2
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    assert client.get_model_version_by_alias("tiny", "newest").tags["step"] == "6"


@pytest.mark.slow
def test_two_processes_end_with_one_line_on_a_pattern_without_match(tmp_path: Path, training: Any, published_base: Path) -> None:
    run = training(tmp_path)
    process = run.start(f"initialise_from={published_base}", "finetune={trainable: [hed.*]}")
    assert process.wait(timeout=120) == 2
    told = [line for line in run.log.splitlines() if line.startswith("error:")]
    assert told and all("'hed.*' matches no name" in line for line in told)
    assert "Traceback" not in run.log
