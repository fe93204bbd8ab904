"""What was published yesterday is sampled and fine-tuned today: a frozen artefact of every kind and version (freeze.py)."""

from pathlib import Path

import freeze
import pytest
import torch
from safetensors.torch import load_file

from model import checkpoint

FROZEN = sorted(path.parent for path in Path(__file__).parent.glob("*/*/expected.safetensors"))


def test_there_is_one_of_every_kind() -> None:
    assert {folder.name for folder in FROZEN} == set(freeze.KINDS)


@pytest.mark.parametrize("folder", FROZEN, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_it_samples_and_trains_as_it_did(folder: Path) -> None:
    """To rounding: the machine that froze it may have had other kernels."""
    expected, published = load_file(folder / "expected.safetensors"), checkpoint.load(folder)
    assert published.manifests.keys() == {"videos", "images"}
    torch.testing.assert_close(freeze.sampled(published.denoiser), expected["sample"], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(freeze.tuned(published.denoiser), expected["losses"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("folder", FROZEN, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_training_starts_from_it(folder: Path) -> None:
    torch.manual_seed(9)
    published = checkpoint.load(folder).denoiser
    fresh = freeze.Denoiser(published.config)
    transfer = checkpoint.initialise_from(fresh, folder)
    assert (transfer.new, transfer.unused, transfer.adapted) == ([], [], [])
    for (name, found), weight in zip(fresh.named_parameters(), published.parameters(), strict=True):
        assert torch.equal(found, weight), name
