"""What can be known of a moving scene under noise: its posterior mean, which no denoiser beats on average.

Caption and frame rate leave little of the benchmark's clips open: how far to the side of its way the object is, how large it is,
and which part of its video is shown. The posterior mean of a clip under noise is a mean of all such clips, weighted by their
likelihood. Here these are the training clips of the same shape, direction and frame rate, in the caption's colours: many, not
all, and the clip itself is not among them. So an error as small as theirs can be had; where noise is slight the least is smaller.

Shapes: N clips, T frames, C channels, H height, W width; videos are in [-1, 1].
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from model.codec import from_pixels
from model.errors import UserError
from pipelines.clips import RealClips, captions
from pipelines.judge import Said, Truth, parse
from pipelines.truth import COLOURS

WINDOWS = 4  # of each clip
MOST = 256  # clips of one shape, direction and frame rate

_Kind = tuple[str, str | None, float]


def colour(word: str) -> Tensor:
    """(C, 1, 1), as in videos."""
    return from_pixels(torch.tensor(COLOURS[word], dtype=torch.uint8).expand(1, 1, 3))


def coverage(video: Tensor, said: Said, background: str) -> Tensor:
    """(T, C, H, W) -> (T, H, W): how much of each pixel is the object's, 0 to 1 but for what codecs add."""
    ground = colour(background)
    way = colour(said.colour) - ground
    return ((video - ground) * way).sum(dim=1) / way.square().sum()


def posterior_mean(noisy: Tensor, noise: float, coverages: Tensor, said: Said, background: str) -> Tensor:
    """Of a clip (T, C, H, W) under Gaussian noise of standard deviation ``noise``, if it is one of (N, T, H, W), all alike."""
    ground = colour(background)
    way = colour(said.colour) - ground
    towards = ((noisy - ground) * way).sum(dim=1)  # log-likelihoods need the noisy clip's part along the way alone
    parts = (coverages * towards).flatten(1).sum(dim=1) - coverages.square().flatten(1).sum(dim=1) * way.square().sum() / 2
    weights = (parts.double() / noise**2).softmax(dim=0).to(coverages)
    return ground + torch.tensordot(weights, coverages, dims=1)[:, None] * way


class Knowable:
    """Clips by what captions and frame rates say of them, for posterior means.

    Raises:
        UserError: no data set, or captions that are not of the benchmark.
    """

    def __init__(self, location: str, frames: int, frame_rates: Sequence[float]) -> None:
        found = defaultdict[_Kind, list[Tensor]](list)
        told = {number: parse(caption) for number, caption in enumerate(captions(location))}
        told = {number: truth for number, truth in told.items() if _is_simple(truth)}
        for seed in range(WINDOWS):
            clips = RealClips(location, frames, frame_rates, seed)
            for number, truth in tqdm(told.items(), f"{location}, part {seed + 1} of {WINDOWS}", unit="clip", leave=False):
                (said,) = truth.objects
                if all(len(found[_kind(said, rate)]) == MOST for rate in frame_rates):
                    continue  # and decode no more than is kept
                clip = clips.read(number)
                alike = found[_kind(said, clip.frame_rate)]
                if len(alike) < MOST:
                    covered = coverage(from_pixels(clip.frames), said, truth.background)
                    alike.append(covered.half())  # to half the memory; they are of 8 bits
        self._coverages = {kind: torch.stack(alike) for kind, alike in found.items() if alike}

    def tells(self, caption: str, frame_rate: float) -> bool:
        """Whether there are clips of the kind that a caption says."""
        return self._alike(parse(caption), frame_rate) is not None

    def mean(self, noisy: Tensor, noise: float, caption: str, frame_rate: float) -> Tensor:
        """The posterior mean of a clip, of which ``noisy`` is all that is seen; both (T, C, H, W).

        Raises:
            UserError: no clip is of the kind that the caption says.
        """
        truth = parse(caption)
        alike = self._alike(truth, frame_rate)
        if alike is None:
            raise UserError(f"no training clip tells what can be known of {caption!r} at {frame_rate:g} frames per second")
        return posterior_mean(noisy, noise, alike.float(), truth.objects[0], truth.background)

    def _alike(self, truth: Truth, frame_rate: float) -> Tensor | None:
        return self._coverages.get(_kind(truth.objects[0], frame_rate)) if _is_simple(truth) else None


def _is_simple(truth: Truth) -> bool:
    return len(truth.objects) == 1 and truth.background in COLOURS  # no checkerboard


def _kind(said: Said, frame_rate: float) -> _Kind:
    return said.shape, said.direction, frame_rate
