"""Weights for noise levels, so that each has an equal say in training: uncertainty weighting.

Kendall et al. (2018) divide each task's loss by its own level; EDM2 (Karras et al. 2024, equation 21) takes noise levels for
tasks and learns that level with a small network. Here it is a running mean of the loss, so that it adds no parameter to the
network or to what is published.

Beyond the paper, whose effective weight (equation 43) balances the levels at the start, before anything is learnt; later the loss
at some levels is tens of times as large as at others, most of it of what cannot be known, and drowns what they have yet to learn.
"""

import torch
from torch import Tensor

from model.diffusion.edm import DiffusionConfig

BINS = 32  # of sigma, each as likely as another in training
HORIZON = 50  # samples of a bin that its mean remembers
SPIKE = 30.0  # a loss so many times the mean counts as no more, or one broken sample would silence its noise level for long


class LossLevels:
    """Running mean of the loss by noise level, and the weights that follow. All ranks' are equal if the same sums update them.

    Attributes:
        means: (BINS,) of the loss, 1 at the start: what an untrained network has.
        counts: (BINS,) samples that the means have seen, 1 at the start.
    """

    def __init__(self, config: DiffusionConfig) -> None:
        self.config = config
        self.means, self.counts = torch.ones(BINS), torch.ones(BINS)

    def weights(self, sigma: Tensor) -> Tensor:
        """(B,) -> (B,): the inverse of the loss at such levels, with a geometric mean of 1 over the draws of training."""
        logs = self.means.to(sigma.device).log()
        return (logs.mean() - logs)[self._bins(sigma)].exp()

    def sums(self, sigma: Tensor, loss: Tensor) -> Tensor:
        """(2, BINS): sums of the loss (B,) and numbers of samples; those of several batches or ranks may be added."""
        known, bins = loss.isfinite(), self._bins(sigma)
        most = SPIKE * self.means.to(loss)[bins]
        parts = torch.stack([torch.where(known, loss.minimum(most), 0.0), known.to(loss.dtype)])
        return parts.new_zeros(2, BINS).index_add_(1, bins, parts)

    def update(self, sums: Tensor) -> None:
        """Take ``sums`` (2, BINS) of a step into the means."""
        total, new = sums.to(self.means.dtype)
        self.means, self.counts = self.means.to(sums.device), self.counts.to(sums.device)
        kept = torch.minimum((1 - 1 / HORIZON) ** new, self.counts / (self.counts + new))
        # A loss of nothing at all would weigh endlessly. Where no sample is new, all is kept.
        self.means = torch.lerp(total / new.clamp(min=1), self.means, kept).clamp(min=1e-8)
        self.counts = self.counts + new

    def _bins(self, sigma: Tensor) -> Tensor:
        quantile = torch.special.ndtr((sigma.log() - self.config.log_sigma_mean) / self.config.log_sigma_std)
        return (quantile * BINS).long().clamp(max=BINS - 1)
