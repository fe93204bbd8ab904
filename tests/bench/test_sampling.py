"""The comparison runs whole on a small network, and counts the evaluations that the sampler makes."""

from pathlib import Path

import pytest

from bench import sampling
from model.denoiser import Denoiser


def test_a_clip_is_timed_against_as_many_evaluations(small_fit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []
    built = Denoiser.__init__

    def counted(self: Denoiser, *arguments: object) -> None:
        built(self, *arguments)  # type: ignore[arg-type]
        self.network.register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))

    monkeypatch.setattr(Denoiser, "__init__", counted)
    result = sampling.compare(small_fit, steps=3, rounds=2, precision="fp32")
    assert batches == [2] * (5 * 2 * 3), "5 evaluations of both branches, by sampler and bare, three times"
    assert result["evaluations"] == 5 and result["seconds"]["sampler"] > 0
    assert f"{100 * result['overhead']:+.2f} % beyond them" in sampling.report(result)
