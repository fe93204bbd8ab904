"""LAMB against a loop written from the paper, and on shards against itself."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.lamb import LAMB, LAMBConfig


def reference(
    weights: list[Tensor], gradients: list[list[Tensor]], lr: float, betas: tuple[float, float], decay: float
) -> list[Tensor]:
    """Algorithm 2 of You et al. without bias correction; decay inside the trust ratio, weight norms clamped at 10."""
    weights = [w.clone() for w in weights]
    first, second = [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]
    for step in gradients:
        for i, g in enumerate(step):
            first[i] = betas[0] * first[i] + (1 - betas[0]) * g
            second[i] = betas[1] * second[i] + (1 - betas[1]) * g**2
            update = first[i] / (second[i].sqrt() + 1e-8) + decay * weights[i]
            weight_norm, update_norm = math.sqrt(float((weights[i] ** 2).sum())), math.sqrt(float((update**2).sum()))
            ratio = min(weight_norm, 10.0) / update_norm if weight_norm > 0 and update_norm > 0 else 1.0
            weights[i] = weights[i] - lr * ratio * update
    return weights


def run(weights: list[Tensor], gradients: list[list[Tensor]], config: LAMBConfig) -> list[Tensor]:
    parameters = [torch.nn.Parameter(w.clone()) for w in weights]
    optimizer = LAMB(parameters, config)
    for step in gradients:
        for p, g in zip(parameters, step, strict=True):
            p.grad = g.clone()
        optimizer.step()
    return [p.detach() for p in parameters]


def problem(steps: int = 6) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Ordinary, large (norm over 10), zero, scalar and tiny weights; the fourth step's gradients are zero."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    weights = [normal(4, 3), 30 * normal(8, 5), torch.zeros(5, dtype=torch.float64), normal(1)[0], 1e-6 * normal(3)]
    gradients = [[normal(*w.shape) * 10.0 ** (2 - i) for i, w in enumerate(weights)] for _ in range(steps)]
    gradients[3] = [torch.zeros_like(g) for g in gradients[3]]
    return weights, gradients


@pytest.mark.parametrize("decay", [0.0, 0.01, 0.5])
@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.0, 0.5)])
def test_steps_are_those_of_the_paper(decay: float, betas: tuple[float, float]) -> None:
    weights, gradients = problem()
    assert weights[1].norm() > 10
    found = run(weights, gradients, LAMBConfig(lr=0.05, betas=betas, weight_decay=decay))
    for ours, expected in zip(found, reference(weights, gradients, 0.05, betas, decay), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-12)


def test_the_first_step_in_closed_form() -> None:
    # m = 0.1 g, v = 0.01 g^2: every entry of the update is 1, its norm sqrt(n), whatever the gradient's scale.
    weight = torch.full((4, 4), 0.5)  # norm 2, as large as 16 entries of 0.5
    for scale in (1e-3, 1e3):
        moved = run([weight], [[torch.full((4, 4), scale)]], LAMBConfig(lr=0.1, weight_decay=0.0))[0]
        torch.testing.assert_close(moved, weight - 0.1 * 2 / 4, rtol=1e-4, atol=0)
    clamped = run([100 * weight], [[torch.ones(4, 4)]], LAMBConfig(lr=0.1, weight_decay=0.0))[0]
    torch.testing.assert_close(clamped, 100 * weight - 0.1 * 10 / 4)


def test_a_zero_weight_or_update_has_ratio_one() -> None:
    config = LAMBConfig(lr=0.1, weight_decay=0.01)
    zero, one = torch.zeros(4), torch.ones(4)
    torch.testing.assert_close(run([zero], [[one]], config)[0], torch.full((4,), -0.1))
    assert torch.equal(run([zero], [[zero]], config)[0], zero)
    still = run([one], [[zero]], LAMBConfig(lr=0.1, weight_decay=0.0))[0]
    assert torch.equal(still, one)


def test_parameters_without_gradient_rest_and_groups_have_their_own_rates() -> None:
    a, b, idle = (torch.nn.Parameter(torch.ones(3)) for _ in range(3))
    optimizer = LAMB([{"params": [a, idle]}, {"params": [b], "lr": 0.2}], LAMBConfig(lr=0.1, weight_decay=0.0))
    a.grad, b.grad = torch.ones(3), torch.ones(3)
    assert optimizer.step(lambda: torch.tensor(7.0)) == 7
    torch.testing.assert_close(a.detach(), torch.full((3,), 0.9))
    torch.testing.assert_close(b.detach(), torch.full((3,), 0.8))
    assert torch.equal(idle.detach(), torch.ones(3))


def test_large_parameters_go_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, gradients = problem()
    whole = run(weights, gradients, LAMBConfig())
    for size in (1, 13):
        monkeypatch.setattr("model.lamb.CHUNK", size)
        assert all(torch.equal(a, b) for a, b in zip(run(weights, gradients, LAMBConfig()), whole, strict=True))


def test_parameters_of_lower_precision_have_moments_and_steps_in_float32() -> None:
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(64, 8, generator=generator).bfloat16(), 30 * torch.randn(500, generator=generator).bfloat16()]
    gradients = [[1e-3 * torch.randn(w.shape, generator=generator).bfloat16() for w in weights] for _ in range(5)]
    config = LAMBConfig(lr=0.05, weight_decay=0.1)
    low = [torch.nn.Parameter(w.clone()) for w in weights]
    optimizer = LAMB(low, config)
    expected = [w.double() for w in weights]
    state: list[list[Tensor]] = [[], []]
    for number, step in enumerate(gradients):
        if number == 2:  # a checkpoint in between loses nothing either
            fresh = LAMB(low, config)
            fresh.load_state_dict(optimizer.state_dict())
            optimizer = fresh
        for p, g in zip(low, step, strict=True):
            p.grad = g.clone()
        optimizer.step()
        # The reference: the paper's step in float64 from the gradients so far, rounded to bfloat16 once, at its end.
        for i, g in enumerate(step):
            state[i].append(g.double())
            first = sum((0.1 * 0.9 ** (number - k) * past for k, past in enumerate(state[i])), torch.zeros(()))
            second = sum((0.01 * 0.99 ** (number - k) * past**2 for k, past in enumerate(state[i])), torch.zeros(()))
            update = first / (second.sqrt() + 1e-8) + 0.1 * expected[i]
            exact = expected[i] - 0.05 * min(float(expected[i].norm()), 10.0) / float(update.norm()) * update
            assert optimizer.state[low[i]]["exp_avg"].dtype == optimizer.state[low[i]]["exp_avg_sq"].dtype == torch.float32
            torch.testing.assert_close(optimizer.state[low[i]]["exp_avg"].double(), first, rtol=1e-5, atol=1e-9)
            rounded = exact.bfloat16()
            assert (low[i] != rounded).float().mean() < 0.01  # float32 lands on the other side of a tie now and then
            torch.testing.assert_close(low[i].double(), rounded.double(), rtol=2**-7, atol=0)
            expected[i] = low[i].detach().double()


def test_it_tells_its_trust_ratios_and_how_far_it_went() -> None:
    weights, gradients = problem()
    parameters = [torch.nn.Parameter(w.clone()) for w in weights]
    optimizer = LAMB([{"params": parameters[:3]}, {"params": parameters[3:], "lr": 0.2}], LAMBConfig(lr=0.1))
    assert len(optimizer.trust_ratios) == 0
    for p, g in zip(parameters, gradients[0], strict=True):
        p.grad = g.clone()
    optimizer.step()
    moved = torch.cat([(p - w).flatten() for p, w in zip(parameters, weights, strict=True)]).norm()
    assert float(optimizer.update_norm) == pytest.approx(float(moved), rel=1e-5)
    # The first update is 1 in every entry but for decay, which 0.01 of these weights hardly changes.
    for i, ratio in enumerate(optimizer.trust_ratios.tolist()):
        norm = float(weights[i].norm())
        expected = min(norm, 10) / float((gradients[0][i].sign() + 0.01 * weights[i]).norm()) if norm else 1.0
        assert ratio == pytest.approx(expected, rel=1e-3)


def test_the_state_continues_where_it_was() -> None:
    weights, gradients = problem()
    whole = run(weights, gradients, LAMBConfig())
    parameters = [torch.nn.Parameter(w.clone()) for w in weights]
    optimizer = LAMB(parameters, LAMBConfig())
    for number, step in enumerate(gradients):
        if number == 3:
            fresh = LAMB(parameters, LAMBConfig(lr=1.0))
            fresh.load_state_dict(optimizer.state_dict())
            optimizer = fresh
        for p, g in zip(parameters, step, strict=True):
            p.grad = g
        optimizer.step()
    assert all(torch.equal(p, w) for p, w in zip(parameters, whole, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"lr": 0.0}, "lr must be positive"), ({"betas": (0.9, 1.0)}, "betas must be in"), ({"eps": 0.0}, "eps must be positive")],
)
def test_impossible_settings_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LAMBConfig(**options)


def report_of(processes: int) -> dict[str, Any]:
    """What so many processes report, see sharded_optimizers.py."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(processes):
        world = {"RANK": rank, "WORLD_SIZE": processes, "OMP_NUM_THREADS": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **{name: str(value) for name, value in world.items()}}
        command = [sys.executable, str(Path(__file__).with_name("sharded_optimizers.py"))]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        ranks.append(subprocess.Popen(command, env=environment, **pipes))
    try:
        outputs = [process.communicate(timeout=120) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0] * processes, outputs
    return json.loads(outputs[0][0].splitlines()[-1])


@pytest.fixture(scope="module")
def sharded() -> dict[str, Any]:
    return report_of(2)


def test_shards_are_uneven_and_some_are_empty(sharded) -> None:
    first, second = (entry["sharded"] for entry in sharded["locals"])
    assert first == [4 * 5, 4, 2 * 7, 2, 3, 1]
    assert second == [3 * 5, 3, 1 * 7, 1, 0, 0]


def check(found: dict[str, Any]) -> None:
    """Every way of sharding agrees with unsharded float64, at one collective a step, and AdamW at none."""
    assert found["alone"] == found["alone_adam"] == [0, 0, 0, 0]
    for kind in ("sharded", "replicated", "hybrid"):
        assert found[kind]["worst"] < 1e-6, kind
        assert found[kind]["worst_low_precision"] < 2**-8, kind
        assert found[kind]["collectives"] == [1, 1, 1, 1], kind
        assert found[kind]["worst_adam"] < 1e-5, kind
        assert found[kind]["collectives_adam"] == [0, 0, 0, 0], kind


def test_on_two_processes_it_is_exact_at_one_collective_a_step(sharded) -> None:
    check(sharded)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 4])
def test_on_other_numbers_of_processes_too(processes: int) -> None:
    check(report_of(processes))
