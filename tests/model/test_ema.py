"""The moving average in closed form."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.ema import EMA, EMAConfig


def at(model: nn.Module, step: int) -> Any:
    """What the callback reads of Composer's state."""
    return SimpleNamespace(model=model, timestamp=SimpleNamespace(batch=step))


def constant(value: float) -> nn.Module:
    model = nn.Linear(3, 2).double()
    return fill(model, value)


def fill(model: nn.Module, value: float) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(value)
    return model


def started(config: EMAConfig, model: nn.Module, step: int = 0) -> EMA:
    ema = EMA(config)
    ema.before_load(at(model, step), None)
    ema.fit_start(at(model, step), None)
    return ema


def values(ema: EMA) -> list[float]:
    return [value for weight in ema.weights.values() for value in weight.flatten().tolist()]


def test_a_constant_stays_what_it_is() -> None:
    model = constant(0.7)
    ema = started(EMAConfig(half_life=10), model)
    for step in range(1, 50):
        ema.batch_end(at(model, step), None)
    assert values(ema) == [0.7] * 8


@pytest.mark.parametrize("half_life", [1, 10, 60])
def test_after_the_half_life_half_remains(half_life: int) -> None:
    model = constant(1.0)
    ema = started(EMAConfig(half_life=half_life), model)
    fill(model, 0.0)
    first = 10_000  # far behind the ramp
    for step in range(first, first + half_life):
        ema.batch_end(at(model, step), None)
    assert values(ema) == pytest.approx([0.5] * 8, rel=1e-9)


def test_the_average_of_any_sequence_is_the_weighted_sum() -> None:
    config = EMAConfig(half_life=7, ramp=0.2)
    sequence = torch.randn(60, generator=torch.Generator().manual_seed(0)).tolist()
    model = constant(sequence[0])
    ema = started(config, model)
    expected = sequence[0]
    for step, value in enumerate(sequence[1:], start=1):
        ema.batch_end(at(fill(model, value), step), None)
        # EDM's ramp: the half-life is at most a fifth of the steps so far.
        share = 2 ** (-1 / min(7, 0.2 * step))
        expected = share * expected + (1 - share) * value
    assert values(ema) == pytest.approx([expected] * 8, rel=1e-12)


def test_the_ramp_forgets_the_start() -> None:
    # With the ramp, what remains of the start after n steps is a power of n, not 2^(-n / half-life) of a long half-life.
    model = constant(1.0)
    ema = started(EMAConfig(half_life=6000, ramp=0.05), model)
    fill(model, 0.0)
    for step in range(1, 101):
        ema.batch_end(at(model, step), None)
    assert max(values(ema)) < 1e-6
    assert EMAConfig(half_life=6000, ramp=0.05).decay(10**6) == 0.5 ** (1 / 6000)
    assert EMAConfig(half_life=6000, ramp=0.05).decay(1200) == 0.5 ** (1 / 60)


def bits(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone().view(torch.int32) for p in model.parameters()]


def test_swapped_shows_the_average_and_restores_every_bit() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    ema = started(EMAConfig(half_life=3), model)
    for step in range(1, 6):
        for p in model.parameters():
            nn.init.normal_(p)
        ema.batch_end(at(model, 100 + step), None)
    own, average = bits(model), [w.clone() for w in ema.weights.values()]
    held = [p.data_ptr() for p in model.parameters()]
    with ema.swapped(model):
        assert all(torch.equal(p, w) for p, w in zip(model.parameters(), average, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(bits(model), own, strict=True))
    assert all(torch.equal(w, a) for w, a in zip(ema.weights.values(), average, strict=True))
    with pytest.raises(RuntimeError, match="in the middle"), ema.swapped(model):
        raise RuntimeError("in the middle")
    assert all(torch.equal(a, b) for a, b in zip(bits(model), own, strict=True))
    assert [p.data_ptr() for p in model.parameters()] == held  # optimisers hold these tensors


def test_state_goes_through_a_checkpoint(tmp_path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 4)
    ema = started(EMAConfig(half_life=3), model)
    for p in model.parameters():
        nn.init.normal_(p)
    ema.batch_end(at(model, 100), None)
    torch.save(ema.state_dict(), tmp_path / "state.pt")

    torch.manual_seed(1)
    other = nn.Linear(5, 4)
    resumed = EMA(EMAConfig(half_life=3))
    resumed.before_load(at(other, 0), None)
    held = {name: w.data_ptr() for name, w in resumed.weights.items()}
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert {name: w.data_ptr() for name, w in resumed.weights.items()} == held  # filled in place, as sharded loading needs
    resumed.fit_start(at(other, 100), None)  # a run that goes on does not start its average afresh
    assert all(torch.equal(w, ema.weights[name]) for name, w in resumed.weights.items())


def test_a_new_run_starts_from_the_weights_it_was_given() -> None:
    model = constant(1.0)
    ema = EMA(EMAConfig())
    ema.before_load(at(model, 0), None)
    fill(model, 2.0)  # stage 1's weights arrive
    ema.fit_start(at(model, 0), None)
    assert values(ema) == [2.0] * 8
    fill(model, 3.0)
    assert values(ema) == [2.0] * 8  # copies


@pytest.mark.parametrize("options", [{"half_life": 0.0}, {"ramp": -1.0}])
def test_impossible_settings_are_named(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="half_life and ramp must be positive"):
        EMAConfig(**options)
