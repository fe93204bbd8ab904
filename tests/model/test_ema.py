"""The moving average in closed form."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
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


def test_averages_of_several_half_lives_stand_side_by_side() -> None:
    config = EMAConfig(half_life=10, others=(3, 40))
    model = constant(0.0)
    together = started(config, model)
    apart = {half_life: started(EMAConfig(half_life=half_life), model) for half_life in (10.0, 3.0, 40.0)}
    for step in range(1, 400):
        fill(model, float(step % 7))
        for ema in (together, *apart.values()):
            ema.batch_end(at(model, step), None)
    assert together.others.keys() == {3, 40}
    for half_life, alone in apart.items():
        found = together.weights if half_life == 10 else together.others[half_life]
        assert all(torch.equal(found[name], weight) for name, weight in alone.weights.items())
    with together.swapped(model, 40):
        assert all(torch.equal(p, apart[40].weights[name]) for name, p in model.named_parameters())
    assert all(float(p.flatten()[0]) == 399 % 7 for p in model.parameters())
    # All of them go through a checkpoint.
    resumed = started(config, constant(9.0))
    resumed.load_state_dict(together.state_dict())
    for half_life, weights in together.others.items():
        assert all(torch.equal(resumed.others[half_life][name], weight) for name, weight in weights.items())


def test_a_step_that_was_kept_from_the_weights_is_kept_from_the_average() -> None:
    model = constant(1.0)
    ema = started(EMAConfig(half_life=1, others=(2,)), model)
    fill(model, 5.0)
    ema.rest = True
    ema.batch_end(at(model, 1000), None)
    assert values(ema) == [1.0] * 8 and float(ema.others[2]["bias"][0]) == 1.0
    ema.batch_end(at(model, 1001), None)
    assert values(ema) == [3.0] * 8


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


@pytest.mark.slow
def test_averages_go_on_at_another_number_of_processes_with_recomputation(tmp_path: Path, training: Any) -> None:
    options = (
        "model.network.dropout=0",  # whose random numbers are each process's own
        "ema={half_life: 20, ramp: 10, others: [3, 100]}",
        "evaluation={every: 100, videos: 3, images: 2, bands: [0.3], batch: 5}",
    )

    def evaluated(run: Any) -> dict[str, float]:
        client = MlflowClient(f"sqlite:///{run.folder}/mlflow.db")
        metrics = client.get_run(client.get_model_version_by_alias("tiny", "newest").run_id).data.metrics
        return {name: value for name, value in metrics.items() if name.startswith("eval/")}

    whole, cut = training(tmp_path / "whole"), training(tmp_path / "cut")
    whole.finish(whole.start(*options))
    process = cut.start(*options)
    cut.wait_for(process, "ep*-ba14/whole.json")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not list((cut.folder / "tiny").glob("model-step-*")), "it had finished before it was killed: nothing was shown"
    cut.finish(cut.start(*options, "model.network.checkpoint_blocks=true", processes=1))

    expected, found = whole.weights(), cut.weights()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert float((found[name] - weight).norm() / weight.norm().clamp(min=1e-12)) < 1e-5, name
    losses = evaluated(whole)
    assert {name.split("/")[1] for name in losses} == {"loss", "ema_3", "ema_100"}
    assert len({losses[f"{where}/videos/total"] for where in ("eval/loss", "eval/ema_3/loss", "eval/ema_100/loss")}) == 3
    assert evaluated(cut) == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("others", [(0.0,), (5.0, 5.0), (6000.0,)])
def test_half_lives_beside_the_first_differ(others: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="others must be positive and differ"):
        EMAConfig(others=others)


@pytest.mark.parametrize("options", [{"half_life": 0.0}, {"ramp": -1.0}])
def test_impossible_settings_are_named(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="half_life and ramp must be positive"):
        EMAConfig(**options)
