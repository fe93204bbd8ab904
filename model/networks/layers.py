"""The few layers that all networks share. Imports torch and einops alone."""

import math
from collections.abc import Callable
from typing import Any, Literal

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


class LayerNorm(nn.LayerNorm):
    """Layer norm whose result has its input's dtype under autocast, too, where weights have that dtype, as under FSDP.

    Autocast would raise input, weight and bias to float32 and leave a float32 result, which the product behind it lowers again:
    four casts around each norm. The kernels compute in float32 whatever they read, so the product sees the same numbers.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> the same."""
        device = "cuda" if x.is_meta else x.device.type  # meta tensors stand for a GPU's where a step is planned
        if x.dtype != self.weight.dtype or not torch.is_autocast_enabled(device):
            return super().forward(x)
        with torch.autocast(device, enabled=False):
            return super().forward(x)


Activation = Literal["gelu", "silu"]
ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {"gelu": functional.gelu, "silu": functional.silu}


class ActivationDropout(torch.autograd.Function):
    """An activation, then dropout, of which nothing is kept for the backward pass but the input and the result.

    Which numbers were dropped is read off the result, which the layer behind keeps anyway: they are zero. PyTorch's own two steps
    keep a mask besides, a byte a number. A result that is zero although it was not dropped passes no gradient; only an input of
    exactly zero, or one so negative that its gradient is nothing, has such a result.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: Activation, p: float) -> Tensor:
        dropped = torch.native_dropout(ACTIVATIONS[activation](x), p, True)[0]
        ctx.save_for_backward(x, dropped)
        ctx.activation, ctx.p = activation, p
        return dropped

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, dropped = ctx.saved_tensors
        gradient = torch.ops.aten.native_dropout_backward(gradient, dropped != 0, 1 / (1 - ctx.p))
        of_activation = torch.ops.aten.gelu_backward if ctx.activation == "gelu" else torch.ops.aten.silu_backward
        return of_activation(gradient, x), None, None


def activate(x: Tensor, activation: Activation, dropout: float) -> Tensor:
    """The activation of ``x``, with ``dropout`` unless that is zero."""
    return ActivationDropout.apply(x, activation, dropout) if dropout else ACTIVATIONS[activation](x)


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
        self.query_norm = LayerNorm(query_width)
        if context_width is None:
            self.query_key_value = nn.Linear(query_width, 3 * inner, bias=False)
        else:
            self.context_norm = LayerNorm(context_width)
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
        # By chunks of the last dimension, whose gradients are put together in one copy; unbinding a first one takes two.
        if self.is_self_attention:
            parts = self.query_key_value(query).chunk(3, dim=-1)
        else:
            parts = (self.query(query), *self.key_value(self.context_norm(context)).chunk(2, dim=-1))
        q, k, v = (part.unflatten(-1, (-1, self.head_width)).transpose(1, 2) for part in parts)  # (B, heads, M or N, head width)
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
        self.norm = LayerNorm(width)
        self.expand = nn.Linear(width, self.MULTIPLE * width)
        self.dropout = dropout
        self.contract = nn.Linear(self.MULTIPLE * width, width)

    def reset_parameters(self) -> None:
        init_linear(self.expand)
        init_linear(self.contract, self.output_gain)

    def forward(self, x: Tensor, modulate: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """(..., width) -> the same. ``modulate`` changes what the norm gives."""
        x = self.norm(x)
        if modulate is not None:
            x = modulate(x)
        return self.contract(activate(self.expand(x), "gelu", self.dropout if self.training else 0.0))


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
