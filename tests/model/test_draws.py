"""Random numbers by sample: whose they are, and how they are spread."""

import torch

from model.draws import Draws

CPU = torch.device("cpu")


def test_a_samples_numbers_are_its_own_whatever_stands_beside_it() -> None:
    together = Draws([5, 7, 2**63 - 1], CPU)
    alone = Draws([7], CPU)
    for _ in range(2):
        assert torch.equal(together.normal(3, 4)[1:2], alone.normal(3, 4))
        assert torch.equal(together.uniform()[1:2], alone.uniform())


def test_draws_are_spread_as_named() -> None:
    draws = Draws(range(2000), CPU)
    normal, uniform = draws.normal(50), draws.uniform()
    assert (normal.shape, uniform.shape, normal.dtype) == ((2000, 50), (2000,), torch.float32)
    assert abs(float(normal.mean())) < 0.02 and abs(float(normal.std()) - 1) < 0.02
    # Across seeds, not along one: neighbouring seeds must not give neighbouring numbers.
    assert (
        abs(float(normal[:, 0].mean())) < 0.1
        and abs(float(torch.corrcoef(torch.stack([normal[:-1, 0], normal[1:, 0]]))[0, 1])) < 0.1
    )
    assert abs(float(uniform.mean()) - 0.5) < 0.03 and float(uniform.min()) >= 0 and float(uniform.max()) < 1


def test_nothing_is_drawn_on_the_meta_device() -> None:
    draws = Draws([1, 2], torch.device("meta"))
    assert draws.normal(3).shape == (2, 3) and draws.uniform().device.type == "meta"
