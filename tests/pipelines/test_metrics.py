"""Metrics against closed forms and references in float64, with extractors made on the spot in the files' real formats."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from model.errors import UserError
from pipelines.metrics import Extractor, ExtractorConfig, Frechet, inception_score


def save(module: nn.Module, path: Path) -> str:
    """Write TorchScript; returns its sha256."""
    torch.jit.script(module).save(str(path))
    return hashlib.sha256(path.read_bytes()).hexdigest()


class MeanColour(nn.Module):
    """Means over all but the batch and the colours, of values as they come."""

    def forward(self, x: Tensor, twice: bool = False) -> Tensor:
        found = x.flatten(2).mean(2)
        return torch.cat([found, found], 1) if twice else found


def clips(count: int = 3) -> Tensor:
    return torch.randint(0, 256, (count, 4, 6, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("values", "expected"), [("bytes", 200.0), ("unit", 200 / 255), ("signed", 400 / 255 - 1)])
@pytest.mark.parametrize("kind", ["image", "video"])
def test_an_extractor_sees_frames_as_configured(tmp_path: Path, kind: str, values: str, expected: float) -> None:
    digest = save(MeanColour(), tmp_path / "mean.pt")
    config = ExtractorConfig(str(tmp_path / "mean.pt"), digest, kind, (12, 16), values, {"twice": True})  # type: ignore[arg-type]
    frames = torch.full((2, 4, 6, 8, 3), 200, dtype=torch.uint8)
    frames[..., 1] = 0
    found = Extractor(config, "cpu")(frames)
    assert found.shape == ((8, 6) if kind == "image" else (2, 6))
    zero = {"bytes": 0.0, "unit": 0.0, "signed": -1.0}[values]
    torch.testing.assert_close(found[0, :3], torch.tensor([expected, zero, expected]), rtol=0, atol=1e-4)


def test_bad_extractors_are_told_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "mean.pt"
    digest = save(MeanColour(), path)
    with pytest.raises(UserError, match="no such file"):
        Extractor(ExtractorConfig(str(tmp_path / "none.pt"), digest), "cpu")
    with pytest.raises(UserError, match=f"its sha256 is {digest}, the config says 00"):
        Extractor(ExtractorConfig(str(path), "00"), "cpu")
    text = tmp_path / "text.pt"
    text.write_text("no network")
    with pytest.raises(UserError, match="no TorchScript file"):
        Extractor(ExtractorConfig(str(text), hashlib.sha256(b"no network").hexdigest()), "cpu")
    narrow = tmp_path / "narrow.pt"
    with pytest.raises(UserError, match=r"does not take \(12, 3, 6, 8\)"):
        Extractor(ExtractorConfig(str(narrow), save(nn.Linear(5, 2), narrow)), "cpu")(clips())
    flat = tmp_path / "flat.pt"
    with pytest.raises(UserError, match="gives no row of numbers for each of 12 inputs"):
        Extractor(ExtractorConfig(str(flat), save(nn.Flatten(0), flat)), "cpu")(clips())


def test_two_gaussians_of_known_distance() -> None:
    """N(0, diag(a)) and N(m, diag(b)): |m|^2 + sum (sqrt a - sqrt b)^2, exactly for samples whitened to these moments."""
    generator = torch.Generator().manual_seed(1)

    def samples(mean: list[float], variances: list[float]) -> Tensor:
        x = torch.randn(500, 3, dtype=torch.float64, generator=generator)
        x -= x.mean(0)
        x = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
        return x * torch.tensor(variances, dtype=torch.float64).sqrt() + torch.tensor(mean, dtype=torch.float64)

    distance = Frechet(3)
    distance.add(samples([0, 0, 0], [1, 4, 9]), real=True)
    generated = samples([1, 2, 0], [4, 4, 1])
    distance.add(generated[:123], real=False)
    distance.add(generated[123:], real=False)
    assert distance.value() == pytest.approx(5 + 1 + 0 + 4, rel=1e-9)
    again = Frechet(3)
    again.restore(distance.sums(real=True), real=True)
    again.add(generated, real=False)
    assert again.value() == pytest.approx(distance.value(), rel=1e-12)


def test_the_librarys_distance_is_the_formula() -> None:
    generator = np.random.default_rng(2)
    sets = [generator.normal(size=(400, 6)) @ generator.normal(size=(6, 6)) + generator.normal(size=6) for _ in range(2)]
    means, covariances = zip(*((x.mean(0), np.cov(x.T)) for x in sets), strict=True)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    distance = Frechet(6)
    for real, x in zip((True, False), sets, strict=True):
        distance.add(torch.from_numpy(x), real)
    assert distance.value() == pytest.approx(expected, rel=1e-8)


def test_the_inception_score_of_certain_classes_is_their_number() -> None:
    certain = 100 * torch.eye(5).repeat(20, 1)
    mean, spread = inception_score(certain, 1)
    assert mean == pytest.approx(5, rel=1e-4)
    assert inception_score(torch.zeros(100, 5), 10) == (pytest.approx(1), pytest.approx(0, abs=1e-6))
    assert spread is None
