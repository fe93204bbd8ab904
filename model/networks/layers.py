"""The few layers that all networks share. Imports torch and einops alone."""

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional


def init_linear(layer: nn.Linear, gain: float = 1.0) -> nn.Linear:
    """Truncated normal of variance ``gain^2 / fan_in``; bias zero. Returns the layer."""
    nn.init.trunc_normal_(layer.weight, std=gain / math.sqrt(layer.in_features), a=-3, b=3)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class Attention(nn.Module):
    """Pre-norm attention without biases: layer norm on the query and on the context, residual left to the caller.

    ``query`` (B, M, query_width) attends to ``context`` (B, N, context_width); self-attention where the context is the query.
    The inner width is the smaller of the two sides' widths.

    Args:
        query_width: channels of the query side, also of the output.
        context_width: channels of the context side; None for self-attention.
        head_width: channels per head; must divide the inner width.
        output_gain: gain of the output projection's initialisation.
    """

    def __init__(self, query_width: int, context_width: int | None, head_width: int, output_gain: float = 1.0) -> None:
        super().__init__()
        inner = min(query_width, context_width or query_width)
        if inner % head_width:
            raise ValueError(f"head width {head_width} does not divide the attention's inner width {inner}")
        self.head_width = head_width
        self.output_gain = output_gain
        self.query_norm = nn.LayerNorm(query_width)
        self.context_norm = nn.LayerNorm(context_width) if context_width else None
        self.query = nn.Linear(query_width, inner, bias=False)
        self.key_value = nn.Linear(context_width or query_width, 2 * inner, bias=False)
        self.output = nn.Linear(inner, query_width, bias=False)

    def reset_parameters(self) -> None:
        init_linear(self.query)
        init_linear(self.key_value)
        init_linear(self.output, self.output_gain)

    def forward(self, query: Tensor, context: Tensor | None = None, context_mask: Tensor | None = None) -> Tensor:
        """Return (B, M, query_width). ``context_mask`` (B, N) is True where the context may be read."""
        query = self.query_norm(query)
        context = query if self.context_norm is None else self.context_norm(context)
        q = rearrange(self.query(query), "b m (h c) -> b h m c", c=self.head_width)
        k, v = rearrange(self.key_value(context), "b n (two h c) -> two b h n c", two=2, c=self.head_width)
        mask = None if context_mask is None else context_mask[:, None, None, :]
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.output(rearrange(attended, "b h m c -> b m (h c)"))


class FeedForward(nn.Module):
    """Pre-norm feed-forward with biases, residual left to the caller: (..., width) -> (..., width)."""

    MULTIPLE = 4

    def __init__(self, width: int, dropout: float = 0.0, output_gain: float = 1.0) -> None:
        super().__init__()
        self.output_gain = output_gain
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, self.MULTIPLE * width)
        self.dropout = nn.Dropout(dropout)
        self.contract = nn.Linear(self.MULTIPLE * width, width)

    def reset_parameters(self) -> None:
        init_linear(self.expand)
        init_linear(self.contract, self.output_gain)

    def forward(self, x: Tensor) -> Tensor:
        return self.contract(self.dropout(functional.gelu(self.expand(self.norm(x)))))


class ScalarEmbedding(nn.Module):
    """A scalar per sample -> one token: Fourier features of geometric frequencies, then a two-layer perceptron."""

    FEATURES = 64
    OCTAVES = (-4.0, 4.0)  # frequencies from 2^-4 to 2^4 cycles per unit: the inputs are logarithms of a few units' range

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(2 * self.FEATURES, width)
        self.output = nn.Linear(width, width)

    def reset_parameters(self) -> None:
        init_linear(self.hidden)
        init_linear(self.output)

    def forward(self, values: Tensor) -> Tensor:
        """(B,) -> (B, width)."""
        octaves = torch.linspace(*self.OCTAVES, self.FEATURES, device=values.device, dtype=torch.float32)
        phases = 2 * math.pi * torch.exp2(octaves) * values.float()[:, None]
        features = math.sqrt(2) * torch.cat([phases.cos(), phases.sin()], dim=1)  # unit variance
        return self.output(functional.silu(self.hidden(features.to(self.hidden.weight.dtype))))


def reset_parameters(network: nn.Module) -> None:
    """Initialise every module of ``network`` that knows how, for a network built on the meta device, after ``to_empty``.

    Children come before their parents, whose schemes may override what a plain layer did by default.
    """
    for module in reversed(list(network.modules())):
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
