"""Clipping against torch's own; norms under sharding are tested with LAMB (test_lamb.py)."""

import pytest
import torch
from torch import nn

from model.gradients import clip


@pytest.mark.parametrize("bound", [0.5, 1e6])
def test_clipping_is_torchs(bound: float) -> None:
    params = [nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(5))]
    gradients = [torch.randn(p.shape, generator=torch.Generator().manual_seed(3)) for p in params]
    for p, gradient in zip(params, gradients, strict=True):
        p.grad = gradient.clone()
    norm = nn.utils.clip_grad_norm_(params, bound)
    clip(gradients, norm, bound)
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(params, gradients, strict=True))
