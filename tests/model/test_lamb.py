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


@pytest.fixture(scope="module")
def sharded() -> dict[str, Any]:
    """What two processes report, see sharded_lamb.py."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(2):
        world = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **{name: str(value) for name, value in world.items()}}
        command = [sys.executable, str(Path(__file__).with_name("sharded_lamb.py"))]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, env=environment, **pipes))
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    return json.loads(outputs[0][0].splitlines()[-1])


def test_shards_are_uneven_and_some_are_empty(sharded) -> None:
    first, second = (entry["sharded"] for entry in sharded["locals"])
    assert first == [4 * 5, 4, 2 * 7, 2, 3, 1]
    assert second == [3 * 5, 3, 1 * 7, 1, 0, 0]


@pytest.mark.parametrize("kind", ["sharded", "replicated", "hybrid"])
def test_on_shards_it_is_exact(sharded, kind: str) -> None:
    assert sharded[kind]["worst"] < 1e-6


@pytest.mark.parametrize("kind", ["sharded", "replicated", "hybrid"])
def test_a_step_costs_one_collective(sharded, kind: str) -> None:
    assert sharded[kind]["collectives"] == [1, 1, 1, 1]
    assert sharded["alone"] == [0, 0, 0, 0]
