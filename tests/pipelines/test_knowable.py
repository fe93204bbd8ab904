"""Posterior means against closed forms, and against clips that dataprep draws."""

import itertools

import pytest
import torch

from dataprep import moving_scenes as benchmark
from model.codec import from_pixels
from model.errors import UserError
from pipelines import knowable
from pipelines.clips import RealClips, captions
from pipelines.judge import Said, parse
from pipelines.knowable import Knowable, colour, coverage, posterior_mean
from pipelines.learned import LearnedConfig

SAID = Said("red", "circle", "left")


def shown(coverages: torch.Tensor) -> torch.Tensor:
    """(..., T, H, W) -> videos (..., T, C, H, W) of ``SAID`` on blue."""
    return colour("blue") + coverages[..., None, :, :] * (colour("red") - colour("blue"))


def test_a_real_clip_is_its_colours_and_its_coverage(learned_config: LearnedConfig) -> None:
    clips = RealClips(learned_config.high, 4, (8,), 0)
    for number in range(len(clips)):
        clip = clips.read(number)
        truth = parse(clip.caption)
        video = from_pixels(clip.frames)
        covered = coverage(video, truth.objects[0], truth.background)
        assert covered.min() > -0.1 and 0.9 < covered.max() < 1.1
        ground = colour(truth.background)
        again = ground + covered[:, None] * (colour(truth.objects[0].colour) - ground)
        assert (again - video).square().mean() < 1e-3  # the codec's


@pytest.mark.parametrize("noise", [0.3, 2.0, 50.0])
def test_the_posterior_mean_is_that_of_bayes(noise: float) -> None:
    generator = torch.Generator().manual_seed(0)
    coverages = torch.rand(5, 2, 3, 4, generator=generator)
    noisy = shown(coverages[2]) + noise * torch.randn(2, 3, 3, 4, generator=generator)
    clips = shown(coverages).double()
    likelihoods = torch.exp(-(noisy - clips).square().flatten(1).sum(dim=1) / (2 * noise**2))
    expected = torch.tensordot(likelihoods / likelihoods.sum(), clips, dims=1)
    found = posterior_mean(noisy, noise, coverages, SAID, "blue")
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_little_noise_leaves_no_doubt_and_much_leaves_the_mean() -> None:
    coverages = torch.rand(5, 2, 3, 4, generator=torch.Generator().manual_seed(1))
    video = shown(coverages[3])
    torch.testing.assert_close(posterior_mean(video, 0.01, coverages, SAID, "blue"), video)
    torch.testing.assert_close(posterior_mean(video, 1e4, coverages, SAID, "blue"), shown(coverages.mean(dim=0)))


def test_it_knows_where_a_noisy_object_is(learned_config: LearnedConfig) -> None:
    """New colours of a shape and a direction count; the error is between nothing and that of the clips' mean."""
    known, clips = Knowable(learned_config.trained, 4, (8, 6)), RealClips(learned_config.low, 4, (8, 6), 3)
    found = {0.5: 0.0, 1e3: 0.0}
    for number, noise in itertools.product(range(len(clips)), found):
        clip = clips.read(number)
        video = from_pixels(clip.frames)
        eps = torch.randn(video.shape, generator=torch.Generator().manual_seed(number))
        mean = known.mean(video + noise * eps, noise, clip.caption, clip.frame_rate)
        found[noise] += float((mean - video).square().mean()) / len(clips)
    assert 0 < found[0.5] < 0.5 * found[1e3] < 0.1


def test_what_no_training_clip_tells(learned_config: LearnedConfig) -> None:
    known = Knowable(learned_config.trained, 4, (8,))
    combination = next(iter(benchmark.combinations("unseen")))
    with pytest.raises(UserError, match="no training clip tells .* at 6 frames per second"):
        known.mean(torch.zeros(4, 3, 6, 16), 1.0, f"a {combination[0]} {combination[1]} moves left on a blue background", 6)
    assert known.tells("a red circle moves left on a blue background", 8)
    assert not known.tells("a red circle moves left on a blue background", 6)
    assert not known.tells("a red circle moves left and a green square moves left on a blue background", 8)


def test_of_two_objects_and_of_pans_nothing_is_known(wide_clips: str) -> None:
    known = Knowable(wide_clips, 4, (8,))
    assert not known.tells("the camera pans left over a red circle on a blue and white checkerboard", 8)
    assert not any(known.tells(caption, 8) for caption in captions(wide_clips))


def test_no_more_is_decoded_than_is_kept(learned_config: LearnedConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knowable, "MOST", 3)
    known, read = [], []
    monkeypatch.setattr(RealClips, "read", lambda self, number, own=RealClips.read: read.append(number) or own(self, number))
    for windows in (1, 40):
        monkeypatch.setattr(knowable, "WINDOWS", windows)
        read.clear()
        known.append((Knowable(learned_config.trained, 4, (8,)), len(read)))
    assert known[0][1] == known[1][1] == 3 * 15  # shapes and directions
