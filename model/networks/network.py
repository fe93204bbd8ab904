"""What every network is to the rest of the house, and the unit in which networks are sharded, compiled and checkpointed.

Imports torch alone.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.networks.conditioning import Conditioning


class NetworkOutput(NamedTuple):  # a tuple, because FSDP looks for tensors in tuples
    """What a forward pass of any network returns."""

    video: Tensor | None  # (B, T, C, H, W), None where only the latents were asked for
    latents: Tensor | None  # to carry to the next evaluation, None for a network without; FIT's are (B, G M, Z)


class Block(nn.Module):
    """A part of a network. FSDP gathers its weights as one, ``torch.compile`` compiles it as one.

    What it does is its ``compute``.

    Args:
        recompute: keep its inputs alone for the backward pass (activation checkpointing).
    """

    compute: Callable[..., Any]

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.recompute = recompute

    def forward(self, *arguments: Any) -> Any:
        """``compute``, recomputed in the backward pass where so configured."""
        # Inside the block, not around it: under FSDP the recomputation then finds the block's weights gathered already.
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.compute, *arguments, use_reentrant=False)
        return self.compute(*arguments)


class NetworkConfig(Protocol):
    """What the configs of all networks say."""

    @property
    def size(self) -> tuple[int, int, int]: ...
    @property
    def channels(self) -> int: ...
    @property
    def text_width(self) -> int: ...
    @property
    def upsampler(self) -> bool: ...


def check_inputs(video: Tensor, conditioning: Conditioning, config: NetworkConfig) -> None:
    """Refuse what a network is not built for.

    Raises:
        ValueError: names the field, what it is and what is allowed.
    """
    c = config
    expected = (c.size[0], c.channels, *c.size[1:])
    if tuple(video.shape[1:]) != expected:
        raise ValueError(f"video: (T, C, H, W) is {tuple(video.shape[1:])}, the network is built for {expected}")
    if conditioning.text.shape[-1] != c.text_width:
        raise ValueError(f"text: width is {conditioning.text.shape[-1]}, the network is built for {c.text_width}")
    low = conditioning.low_resolution
    if c.upsampler != (low is not None):
        raise ValueError(f"low_resolution: must be given to an upsampler and only there (upsampler is {c.upsampler})")
    if low is not None and low.shape != video.shape:
        raise ValueError(f"low_resolution: (T, C, H, W) is {tuple(low.shape[1:])}, the network is built for {expected}")


class Network(nn.Module):
    """The network F: noisy video and conditioning -> normalised target.

    Attributes:
        shard_blocks: whether FSDP gathers each block's weights on its own, or those of the network as one.
    """

    shard_blocks = True

    def forward(
        self, video: Tensor, conditioning: Conditioning, latents: Tensor | None = None, latents_only: bool = False
    ) -> NetworkOutput:
        """One evaluation.

        Args:
            video: (B, T, C, H, W), ``c_in * x_sigma``.
            conditioning: what else the network is told.
            latents: what the previous evaluation left to carry; None (the first one) counts as zeros.
            latents_only: skip all that only the video needs, for the pass that prepares the latents.

        Raises:
            ValueError: an input of another shape than configured.
        """
        raise NotImplementedError

    def fsdp_wrap_fn(self, module: nn.Module) -> bool:
        """The sharding rule, as Composer asks for it."""
        return self.shard_blocks and isinstance(module, Block)

    def compile_blocks(self, **options: Any) -> None:
        """Have ``torch.compile`` make each block's kernels; ``options`` are its own.

        By block, not as a whole: equal blocks share their code, and FSDP gathers their weights outside of it. Where hardly two
        have the same shapes, as in a U-Net, the compiler would give up after a few; it is told to make a version for each.
        """
        blocks = [block for block in self.modules() if isinstance(block, Block)]
        dynamo = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, 4 * len(blocks))  # training or not, with gradients or without
        for block in blocks:
            block.compute = torch.compile(block.compute, fullgraph=True, dynamic=False, **options)

    def adapt(self, weights: Mapping[str, Tensor], source: Any) -> dict[str, Tensor]:
        """What to start from where shapes differ, made from the ``weights`` of a network of its kind with config ``source``."""
        return {}
