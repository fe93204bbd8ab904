"""What a network is told besides its noisy input, and how that becomes tokens (paper section 3.4). Imports torch alone."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from model.networks.layers import ScalarEmbedding, init_linear


@dataclass(frozen=True)
class Conditioning:
    """One row per sample of the batch. B batch, L text tokens, D text width."""

    c_noise: Tensor  # (B,) the noise level, ln(sigma) / 4
    text: Tensor  # (B, L, D) text encoder states
    text_mask: Tensor  # (B, L) True where text is; a row of False means no text: the learned null
    frame_rate: Tensor  # (B,) frames per second; inf marks an image
    resolution: Tensor  # (B, 2) height and width of the source media, pixels
    low_resolution: Tensor | None = None  # (B, T, C, H, W) the upsampler's input, corrupted and already at the output's size
    corruption: Tensor | None = None  # (B,) std of the noise that was added to it

    @property
    def is_image(self) -> Tensor:
        """(B,) True where the frame rate is infinite."""
        return torch.isinf(self.frame_rate)

    def without_text(self, drop: Tensor | None = None) -> "Conditioning":
        """The same with the text dropped, for all samples or for those where ``drop`` (B,) is True."""
        keep = torch.zeros_like(self.text_mask) if drop is None else self.text_mask & ~drop[:, None]
        return replace(self, text_mask=keep)


class TextStandard(nn.Module):
    """Text states -> each channel with its mean taken away, and divided by its spread, over the tokens of captions.

    Not in the paper. What all captions have in common is most of a state and says nothing, but a layer behind it learns that
    first: without a standard, captions are heard much later (docs/learning.md). Mean and spread are measured once, before the
    first step, and do not train; they are parameters, so that they go wherever the weights go.
    """

    LEAST = 1e-3  # of a spread: a channel that never changes is not blown up
    MOST = 30.0  # of a token's norm, in usual ones: one broken caption does not decide for all

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.empty(width), requires_grad=False)
        self.spread = nn.Parameter(torch.empty(width), requires_grad=False)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.mean)
        nn.init.ones_(self.spread)

    @torch.no_grad()
    def measure(self, states: Tensor) -> None:
        """Take mean and spread from ``states`` (N, D) of N tokens, without those that are not finite or far larger than usual.

        Raises:
            ValueError: fewer than two such tokens, or states of another width.
        """
        if states.ndim == 2:
            norms = states.double().norm(dim=1)
            states = states[norms <= self.MOST * norms.nanmedian()]
        if states.ndim != 2 or len(states) < 2 or states.shape[1] != len(self.mean):
            raise ValueError(f"states must be (N, {len(self.mean)}) with N of at least 2, got {tuple(states.shape)}")
        self.mean.copy_(states.double().mean(dim=0))
        self.spread.copy_(states.double().std(dim=0).clamp_min(self.LEAST))

    def forward(self, text: Tensor) -> Tensor:
        """(..., D) -> the same."""
        return (text - self.mean) / self.spread


def measure_text(network: nn.Module, states: Callable[[], Tensor]) -> None:
    """Have the ``TextStandard`` of a network, if it has one, measure ``states()``, which are (N, D)."""
    for module in network.modules():
        if isinstance(module, TextStandard):
            module.measure(states())


class ConditioningTokens(nn.Module):
    """Conditioning -> tokens and their mask: text, sigma, frame rate, original height and width, for an upsampler corruption.

    Args:
        text_width: D, the width of the text states.
        width: channels of the tokens.
        corruption: whether the network is an upsampler, told its input's corruption level (one token more).
        standardised: whether the text states are standardised first.
    """

    def __init__(self, text_width: int, width: int, corruption: bool, standardised: bool = False) -> None:
        super().__init__()
        self.standard = TextStandard(text_width) if standardised else None
        self.text = nn.Linear(text_width, width)
        self.null_text = nn.Parameter(torch.empty(width))
        self.sigma = ScalarEmbedding(width)
        self.frame_rate = ScalarEmbedding(width)
        self.image = nn.Parameter(torch.empty(width))  # an image's frame rate is infinite: a value of its own
        self.height = ScalarEmbedding(width)
        self.width = ScalarEmbedding(width)
        self.corruption = ScalarEmbedding(width) if corruption else None

    def reset_parameters(self) -> None:
        init_linear(self.text)
        nn.init.normal_(self.null_text)
        nn.init.normal_(self.image)

    def forward(self, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        """Return tokens (B, N, width) and mask (B, N), True where a token may be read; N is L + 4, or L + 5 for an upsampler.

        Raises:
            ValueError: an upsampler that is not told its corruption level.
        """
        c = conditioning
        text = c.text.to(self.text.weight.dtype)
        text = self.text(self.standard(text) if self.standard else text)
        dropped = ~c.text_mask.any(dim=1)  # (B,): their first text token becomes the null
        first = torch.where(dropped[:, None], self.null_text.to(text.dtype), text[:, 0])
        text = torch.cat([first[:, None], text[:, 1:]], dim=1)
        text_mask = torch.cat([(c.text_mask[:, 0] | dropped)[:, None], c.text_mask[:, 1:]], dim=1)

        rate = self.frame_rate(torch.where(c.is_image, 1.0, c.frame_rate).log2())
        rate = torch.where(c.is_image[:, None], self.image.to(rate.dtype), rate)
        scalars = [self.sigma(c.c_noise), rate, self.height(c.resolution[:, 0].log2()), self.width(c.resolution[:, 1].log2())]
        if self.corruption is not None:
            if c.corruption is None:
                raise ValueError("corruption: an upsampler needs the corruption level of its low-resolution input, got None")
            scalars.append(self.corruption(c.corruption))
        tokens = torch.cat([text, torch.stack(scalars, dim=1).to(text.dtype)], dim=1)
        mask = torch.cat([text_mask, text_mask.new_ones(len(tokens), len(scalars))], dim=1)
        return tokens, mask
