"""The few layers that all networks share. Imports torch and einops alone."""

import math
from collections.abc import Callable

import einops._torch_specific  # noqa: F401  lets torch.compile keep rearrange whole; by itself it comes with the first eager call
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
    The inner width is the smaller of the two sides' widths; with it FIT has the published sizes. The paper says
    nothing of inner widths, norms or biases (Table 8).

    Args:
        query_width: channels of the query side, also of the output.
        context_width: channels of the context side; None for self-attention.
        head_width: channels per head; must divide the inner width.
        output_gain: gain of the output projection's initialisation.

    Raises:
        ValueError: a head width that does not divide the inner width.
    """

    def __init__(self, query_width: int, context_width: int | None, head_width: int, output_gain: float = 1.0) -> None:
        super().__init__()
        inner = min(query_width, context_width or query_width)
        if inner % head_width:
            raise ValueError(f"head width {head_width} does not divide the attention's inner width {inner}")
        self.head_width = head_width
        self.output_gain = output_gain
        self.query_norm = nn.LayerNorm(query_width)
        if context_width is None:
            self.query_key_value = nn.Linear(query_width, 3 * inner, bias=False)
        else:
            self.context_norm = nn.LayerNorm(context_width)
            self.query = nn.Linear(query_width, inner, bias=False)
            self.key_value = nn.Linear(context_width, 2 * inner, bias=False)
        self.is_self_attention = context_width is None
        self.output = nn.Linear(inner, query_width, bias=False)

    def reset_parameters(self) -> None:
        for projection in (self.query_key_value,) if self.is_self_attention else (self.query, self.key_value):
            init_linear(projection)
        init_linear(self.output, self.output_gain)

    def forward(self, query: Tensor, context: Tensor | None = None, context_mask: Tensor | None = None) -> Tensor:
        """Return (B, M, query_width). ``context_mask`` (B, N) is True where the context may be read."""
        query = self.query_norm(query)
        if self.is_self_attention:
            q, k, v = rearrange(self.query_key_value(query), "b m (three h c) -> three b h m c", three=3, c=self.head_width)
        else:
            q = rearrange(self.query(query), "b m (h c) -> b h m c", c=self.head_width)
            k, v = rearrange(self.key_value(self.context_norm(context)), "b n (two h c) -> two b h n c", two=2, c=self.head_width)
        mask = None if context_mask is None else context_mask[:, None, None, :]
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.output(rearrange(attended, "b h m c -> b m (h c)"))


class FeedForward(nn.Module):
    """Pre-norm feed-forward with biases and GELU, residual left to the caller.

    Args:
        width: channels of input and output.
        dropout: on the hidden channels.
        output_gain: gain of the second layer's initialisation.
    """

    MULTIPLE = 4  # hidden channels per channel; the paper does not say, its sizes do

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

    def forward(self, x: Tensor, modulate: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """(..., width) -> the same. ``modulate`` changes what the norm gives."""
        x = self.norm(x)
        if modulate is not None:
            x = modulate(x)
        return self.contract(self.dropout(functional.gelu(self.expand(x))))


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
