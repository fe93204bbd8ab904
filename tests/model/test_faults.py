"""Broken steps: how they are told from sound ones, and that nothing of them stays."""

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composer.devices import DeviceCPU
from torch import Tensor

from model.balance import Balance
from model.denoiser import Denoiser
from model.ema import EMA, EMAConfig
from model.errors import RunError
from model.faults import WINDOW, FaultsConfig, History, StepGuard, Suspect, fault, name_suspects, remedy
from model.optimizers import AdamConfig, LAMBConfig, OptimizerConfig, build

NAN, INFINITY = math.nan, math.inf


def usual(loss: float = 2.0, steps: int = WINDOW) -> History:
    history = History()
    for _ in range(steps):
        history = history.with_sound(loss)
    return history


@pytest.mark.parametrize(
    ("loss", "norm", "spike", "told"),
    [
        (2.0, 1.0, None, None),
        (1e9, 1e9, None, None),
        (NAN, 1.0, None, "the loss is nan"),
        (INFINITY, 1.0, 3.0, "the loss is inf"),
        (2.0, NAN, None, "the norm of the gradients is nan, with a loss of 2"),
        (2.0, INFINITY, None, "the norm of the gradients is inf, with a loss of 2"),
        (5.9, 1.0, 3.0, None),
        (6.2, 1.0, 3.0, "the loss is 6.2, 3.1 times the mean of 2"),
    ],
)
def test_what_breaks_a_step(loss: float, norm: float, spike: float | None, told: str | None) -> None:
    assert fault(loss, norm, usual(), spike) == told


def test_no_loss_is_a_spike_before_it_is_known_what_is_usual() -> None:
    assert fault(100.0, 1.0, usual(steps=WINDOW - 1), 3.0) is None
    assert fault(100.0, 1.0, usual(steps=WINDOW), 3.0) is not None


def test_what_is_usual_moves_with_the_loss_and_not_with_what_was_skipped() -> None:
    history = usual(2.0, WINDOW // 2).with_skipped().with_skipped()
    assert (history.mean, history.skipped, history.in_a_row) == (2.0, 2, 2)
    for _ in range(WINDOW // 2):
        history = history.with_sound(4.0)
    assert history.mean == pytest.approx(3.0)  # the plain mean of the first hundred
    assert (history.skipped, history.in_a_row) == (2, 0)
    for _ in range(10 * WINDOW):
        history = history.with_sound(4.0)
    assert history.mean == pytest.approx(4.0, rel=1e-4)


def test_the_log_names_what_to_look_at_first() -> None:
    suspects = [Suspect(f"clip-{i}", i, float(i)) for i in range(20)]
    assert name_suspects(suspects).startswith("largest in clip-19 (19), clip-18 (18)")
    assert "clip-11" not in name_suspects(suspects)
    broken = [*suspects, *(Suspect(f"bad-{i}", i, NAN) for i in range(9))]
    assert name_suspects(broken).startswith("not finite in bad-0, bad-1") and name_suspects(broken).endswith("and 1 more")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spike": 1.0}, "spike must be more than 1, got 1.0"),
        ({"in_a_row": 0}, "in_a_row must be at least 1"),
        ({"roll_backs": 0}, "roll_backs must be"),
    ],
)
def test_impossible_settings_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FaultsConfig(**options)


class Loop:
    """Composer's step in its order of events, for a real model, optimiser and average."""

    def __init__(self, config: Any, faults: FaultsConfig, optimizer: OptimizerConfig, folder: Path) -> None:
        torch.manual_seed(0)
        self.model = Denoiser(config)
        self.optimizer = build(self.model.parameters(), optimizer)
        self.ema = EMA(EMAConfig(half_life=3))
        assert self.model.levels is not None
        self.balance = Balance(self.model.levels)
        self.guard = StepGuard(faults, 0.5, (self.ema, self.balance), folder)
        self.logged: list[dict[str, float]] = []
        self.logger: Any = SimpleNamespace(log_metrics=self.logged.append)
        self.state: Any = SimpleNamespace(
            model=self.model, timestamp=SimpleNamespace(batch=0), device=DeviceCPU(), outputs=None, batch=None
        )
        self.ema.before_load(self.state, self.logger)

    def step(self, batch: dict[str, Any]) -> None:
        self.state.batch = batch
        for callback in (self.guard, self.balance):
            callback.before_train_batch(self.state, self.logger)
        self.optimizer.zero_grad()
        for part in (slice(0, 2), slice(2, 4)):  # microbatches
            self.state.outputs = self.model({name: value[part] for name, value in batch.items()})
            for callback in (self.guard, self.balance):
                callback.after_loss(self.state, self.logger)
            (self.model.loss(self.state.outputs, batch) / 2).backward()
        self.guard.after_train_batch(self.state, self.logger)
        # What the optimiser gets; LAMB writes over it.
        self.gradients = [p.grad.clone() for p in self.model.parameters() if p.grad is not None]
        self.optimizer.step()
        self.state.timestamp.batch += 1
        for callback in (self.ema, self.balance):
            callback.batch_end(self.state, self.logger)

    def held(self) -> list[Tensor]:
        """Every tensor that training carries from step to step."""
        moments = [value for p in self.model.parameters() for value in self.optimizer.state[p].values()]
        kept = (*self.ema.weights.values(), *self.balance.state_dict().values())
        return [t.detach().clone() for t in (*self.model.parameters(), *moments, *kept)]


@pytest.fixture
def loop(stage: Callable[..., Any], tmp_path: Path) -> Callable[..., Loop]:
    def start(faults: FaultsConfig, optimizer: OptimizerConfig | None = None) -> Loop:
        return Loop(stage(uncertainty_weighting=True), faults, optimizer or LAMBConfig(), tmp_path / "faults")

    return start


def sound(clips: Callable[..., dict[str, Any]], seed: int = 0) -> dict[str, Any]:
    return {**clips(4, seed), "key": [f"clip-{i}" for i in range(4)]}


def poisoned(clips: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """One caption whose states are finite and overflow in the network."""
    batch = sound(clips, 9)
    text = batch["text"].clone()
    text[2] = 3e38
    return {**batch, "text": text}


@pytest.mark.parametrize("optimizer", [LAMBConfig(), AdamConfig()])
def test_a_skipped_step_leaves_every_bit(loop, clips, tmp_path: Path, optimizer: OptimizerConfig) -> None:
    run = loop(FaultsConfig(policy="skip"), optimizer)
    untroubled = loop(FaultsConfig(policy="skip"), optimizer)
    for step in range(2):
        run.step(sound(clips, step))
        untroubled.step(sound(clips, step))
    before = run.held()
    run.step(poisoned(clips))
    assert all(torch.equal(a, b) for a, b in zip(run.held(), before, strict=True))
    assert run.guard.history.skipped == 1 and run.logged[-1] == {"faults/skipped": 1}
    listed = json.loads((tmp_path / "faults/step-0000003.json").read_text())
    assert listed["fault"] == "the loss is nan"
    assert [sample["key"] for sample in listed["samples"]] == [f"clip-{i}" for i in range(4)]
    assert [sample["loss"] == "nan" for sample in listed["samples"]] == [False, False, True, False]
    # The next step goes on as if the broken one had not been, but for the average, whose ramp knows the step's number.
    run.step(sound(clips, 2))
    untroubled.step(sound(clips, 2))
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), untroubled.model.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(run.held(), before, strict=True) if a.ndim > 1)
    assert run.guard.history.in_a_row == 0


def test_a_run_that_stops_names_the_samples_and_keeps_the_weights(loop, clips) -> None:
    run = loop(FaultsConfig())
    run.step(sound(clips))
    before = run.held()
    with pytest.raises(
        RunError, match=r"^step 2 stopped: the loss is nan; not finite in clip-2; the batch's samples are in .*02\.json$"
    ):
        run.step(poisoned(clips))
    assert all(torch.equal(a, b) for a, b in zip(run.held(), before, strict=True))


def test_a_run_that_skips_stops_when_it_does_nothing_else(loop, clips, capsys) -> None:
    run = loop(FaultsConfig(policy="skip", in_a_row=2))
    run.step(poisoned(clips))
    run.step(sound(clips))
    for _ in range(2):
        run.step(poisoned(clips))
    assert capsys.readouterr().err.count("skipped: the loss is nan; not finite in clip-2") == 3
    with pytest.raises(RunError, match="^step 5 stopped"):
        run.step(poisoned(clips))


def test_a_run_rolls_back_to_one_checkpoint_so_often_and_no_more() -> None:
    config, history = FaultsConfig(policy="roll_back", roll_backs=2, in_a_row=2), usual(5.0)
    then = usual(2.0, WINDOW // 2)
    assert remedy(config, history, 40) == "rolled back"
    once = history.with_roll_back(then, 40)
    assert (once.mean, once.steps, once.rolled_back) == (then.mean, then.steps, 1)  # what is usual is as it was then
    assert remedy(config, once, 40) == "rolled back"
    twice = once.with_sound(2.0).with_roll_back(then, 40)
    assert twice.rolled_back == 2 and remedy(config, twice, 40) == "stopped"
    assert remedy(config, twice, 80) == "rolled back"  # to a newer one
    assert (twice.with_roll_back(then, 80).rolled_back, twice.with_roll_back(then, 80).times) == (3, 1)
    # Without a checkpoint yet, the step alone is left out.
    assert remedy(config, history, None) == "skipped"
    assert remedy(config, history.with_skipped().with_skipped(), None) == "stopped"
    # The other policies do not look at checkpoints.
    assert remedy(FaultsConfig(), history, 40) == "stopped"
    assert remedy(FaultsConfig(policy="skip"), history, 40) == "skipped"


def test_a_spike_is_skipped_and_the_history_goes_through_a_checkpoint(loop, clips) -> None:
    run = loop(FaultsConfig(policy="skip", spike=4.0))
    run.guard.load_state_dict(json.loads(json.dumps(dataclasses.asdict(usual(1e-3)))))
    before = run.held()
    run.step(sound(clips))
    assert all(torch.equal(a, b) for a, b in zip(run.held(), before, strict=True))
    resumed = loop(FaultsConfig(policy="skip", spike=4.0))
    resumed.guard.load_state_dict(run.guard.state_dict())
    assert resumed.guard.history == replace(usual(1e-3), skipped=1, in_a_row=1)


def test_the_norm_is_that_of_the_whole_gradient_before_clipping(loop, clips) -> None:
    run, other = loop(FaultsConfig()), loop(FaultsConfig())
    run.step(sound(clips))
    for part in (slice(0, 2), slice(2, 4)):
        batch = {name: value[part] for name, value in sound(clips).items()}
        (other.model.loss(other.model(batch), batch) / 2).backward()
    expected = torch.cat([p.grad.flatten() for p in other.model.parameters() if p.grad is not None]).norm()
    assert run.guard.gradient_norm == pytest.approx(float(expected), rel=1e-5)
    kept = torch.cat([gradient.flatten() for gradient in run.gradients]).norm()
    assert float(kept) == pytest.approx(min(0.5, float(expected)), rel=1e-4)
