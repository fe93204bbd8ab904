"""A training step on meta tensors, as a GPU would run it: what it computes and what it keeps, counted; nothing is allocated.

The model's own code runs, so a new network needs no formulas here. The meta device alone would differ from a GPU in three ways
that change sizes, and ``GPUSemantics`` takes them over: autocast, fused attention and fused dropout.
"""

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode, flop_registry

aten = torch.ops.aten

# CUDA's autocast policy, from ATen/autocast_mode.h: what runs in the lower precision, and what in float32.
LOWER_PRECISION = {
    "conv1d", "conv2d", "conv3d", "conv_tbc", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "prelu", "addmm",
    "addmv", "addr", "addbmm", "baddbmm", "bmm", "mm", "mv", "matmul", "__matmul__", "__rmatmul__", "einsum", "vecdot",
    "linear", "chain_matmul", "multi_dot", "scaled_dot_product_attention",
}  # fmt: skip
FLOAT32 = {
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "sinh", "tan",
    "pow", "__pow__", "__rpow__", "softplus", "layer_norm", "group_norm", "nuclear_norm", "cosine_similarity",
    "poisson_nll_loss", "cosine_embedding_loss", "nll_loss", "hinge_embedding_loss", "kl_div", "l1_loss", "smooth_l1_loss",
    "huber_loss", "mse_loss", "margin_ranking_loss", "multilabel_margin_loss", "soft_margin_loss", "triplet_margin_loss",
    "multi_margin_loss", "binary_cross_entropy_with_logits", "dist", "pdist", "cdist", "renorm", "logsumexp", "interpolate",
    "prod", "softmax", "log_softmax", "cumprod", "cumsum", "vector_norm", "matrix_norm", "sum", "norm",
}  # fmt: skip


def convolution_backward_flops(*arguments: Any, out_shape: Any) -> int:
    """FLOPs of ``aten.convolution_backward`` from shapes; by torch's formula channels of different groups meet in the weights."""
    groups, (of_input, of_weights, _) = arguments[9:11]
    count = flop_registry[aten.convolution_backward]
    found = int(count(*arguments[:10], [of_input, False, False], out_val=out_shape))
    return found + int(count(*arguments[:10], [False, of_weights, False], out_val=out_shape)) // groups


def flop_counter() -> FlopCounterMode:
    """torch's counter of matrix products, convolutions and attention, with that formula."""
    return FlopCounterMode(display=False, custom_mapping={aten.convolution_backward: convolution_backward_flops})


class GPUSemantics(TorchFunctionMode):
    """Within, operations on meta tensors have the dtypes and the saved tensors of a GPU.

    Args:
        autocast: the lower precision of CUDA's autocast, or None without autocast. ``torch.autocast("cuda", enabled=False)``
            switches it off within.
    """

    def __init__(self, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.autocast = autocast

    def __enter__(self) -> "GPUSemantics":
        self._before = torch.is_autocast_enabled("cuda")
        torch.set_autocast_enabled("cuda", self.autocast is not None)  # on the meta device it acts on nothing else
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.set_autocast_enabled("cuda", self._before)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        autocast = self.autocast if torch.is_autocast_enabled("cuda") else None
        if autocast and name in LOWER_PRECISION:
            args, kwargs = _cast((args, kwargs), autocast)
        elif autocast and name in FLOAT32:
            args, kwargs = _cast((args, kwargs), torch.float32)
        if func is functional.scaled_dot_product_attention:
            return _fused_attention(*args, **kwargs)
        if func is functional.dropout:
            return _fused_dropout(*args, **kwargs)
        return func(*args, **kwargs)


class Meter(TorchDispatchMode):
    """Counts the floating-point operations and the live bytes of what runs within.

    Bytes are those of tensor storages that were made within and still live; views add nothing. FLOPs are those of matrix
    products, convolutions and attention, two for a multiplication and addition, as ``flop_counter`` has them.

    Attributes:
        flops: by (``phase``, whether gradients were enabled).
        live: bytes now.
        peak: the most bytes that lived at once.
        phase: set by the caller.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops: defaultdict[tuple[str, bool], int] = defaultdict(int)
        self.live = self.peak = 0
        self.phase = ""
        self._formulas = flop_counter().flop_registry
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = self._formulas.get(func._overloadpacket)
        if formula is not None:
            self.flops[self.phase, torch.is_grad_enabled()] += formula(*args, **kwargs, out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor, count=True)
        return result

    def ignore(self, tensors: Sequence[Tensor]) -> None:
        """Take the storages of ``tensors``, made outside, for known, so that views of them count nothing."""
        for tensor in tensors:
            self._see(tensor, count=False)

    def _see(self, tensor: Tensor, count: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if count else 0
        self._known[key] = weakref.ref(storage, partial(self._forget, key, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int, size: int, reference: Any) -> None:
        del self._known[key]
        self.live -= size


@dataclass(frozen=True)
class StepCount:
    """One forward and backward pass of a microbatch. FLOPs and bytes of the whole microbatch."""

    first_pass: int  # FLOPs without gradients before the training pass: self-conditioning
    forward: int  # FLOPs
    backward: int  # FLOPs of the gradients alone
    recomputation: int  # FLOPs of activation checkpointing
    kept: int  # bytes alive between forward and backward: inputs and what is saved for the backward pass
    peak: int  # bytes: the most alive at once, without parameters and their gradients


Precision = Literal["fp32", "amp_bf16"]


class Phased(Protocol):
    """A dispatch mode that is told which phase of a training step runs within it: "forward" or "backward"."""

    phase: str

    def ignore(self, tensors: Sequence[Tensor]) -> None: ...
    def __enter__(self) -> Any: ...
    def __exit__(self, *error: Any) -> None: ...


def run_step(
    model: nn.Module,
    inputs: Callable[[], Any],
    precision: Precision,
    observer: Phased,
    between: Callable[[], None] = lambda: None,
) -> None:
    """Run ``model.loss(model(batch), batch)`` with ``batch = inputs()``, and its backward pass, on meta tensors.

    A parameter's gradient counts as gone as soon as it is complete: then it is reduced into the sharded gradients.

    Args:
        model: on the meta device, with a method ``loss`` such as Composer's models have; its parameters' dtype changes.
        inputs: makes the batch of meta tensors, which ``observer`` sees.
        precision: Composer's.
        observer: sees every operation.
        between: called after the forward pass.
    """
    parameters = list(model.parameters())
    hooks = [p.register_post_accumulate_grad_hook(_drop_gradient) for p in parameters if p.requires_grad]
    try:
        with gathered_dtypes(model, precision):
            observer.ignore(parameters)
            with observer, GPUSemantics(None if precision == "fp32" else compute_dtype(precision)):
                observer.phase = "forward"
                batch = inputs()
                objective = cast(Any, model).loss(model(batch), batch)
                between()
                observer.phase = "backward"
                _backward(objective)
    finally:
        for hook in hooks:
            hook.remove()


def _backward(objective: Tensor) -> None:
    """``objective.backward()`` that stays within ``GPUSemantics``, which recomputation needs.

    ``Tensor.backward`` leaves every function mode while it runs, and so does ``torch.autograd.backward`` since torch 2.7.
    """
    ones = torch.ones_like(objective)
    torch.autograd.graph._engine_run_backward(
        (objective,), (ones,), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


@contextmanager
def gathered_dtypes(model: nn.Module, precision: Precision) -> Iterator[None]:
    """Within, parameters have the dtype in which FSDP2 gathers them, and the inputs of each of its units are cast as it does.

    Afterwards nothing casts inputs any more; the parameters stay as they are.
    """
    compute = compute_dtype(precision)
    model.to(compute)
    hooks = [unit.register_forward_pre_hook(partial(_cast_inputs, compute), with_kwargs=True) for unit in fsdp_units(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def count_step(model: nn.Module, inputs: Callable[[], Any], precision: Precision) -> StepCount:
    """Count a training step as ``run_step`` runs it; the batch's bytes count, too."""
    meter, kept = Meter(), list[int]()
    run_step(model, inputs, precision, meter, lambda: kept.append(meter.live))
    flops = meter.flops
    return StepCount(
        first_pass=flops["forward", False],
        forward=flops["forward", True],
        backward=flops["backward", False],
        recomputation=flops["backward", True],
        kept=kept[0],
        peak=meter.peak,
    )


def fsdp_units(model: nn.Module) -> list[nn.Module]:
    """What Composer wraps of a model, each to be gathered as one: its children, and in each what its rule names."""
    units = []
    for child in model.children():
        rule = getattr(child, "fsdp_wrap_fn", lambda module: False)
        units += [child, *(module for module in child.modules() if module is not child and rule(module))]
    return units


def compute_dtype(precision: Precision) -> torch.dtype:
    """What FSDP2 under Composer gathers parameters in and computes with."""
    return torch.bfloat16 if precision == "amp_bf16" else torch.float32


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors of a tree in ``dtype``."""

    def cast(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return tree_map(cast, tree)


def _cast_inputs(
    dtype: torch.dtype, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args, kwargs = _cast((args, kwargs), dtype)
    return args, kwargs


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention without its matrix of scores, as on a GPU; on the meta device it would fall back to matrix products.

    A mask or float32 excludes flash attention; then it is the memory-efficient kernel, whose mask is a bias.
    """
    if attn_mask is None and query.dtype != torch.float32:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    bias = None
    if attn_mask is not None:
        length = attn_mask.shape[-1]
        padded = query.new_zeros(*attn_mask.shape[:-1], -(-length // 8) * 8)  # the kernel wants rows of whole 8s
        bias = padded[..., :length].expand(*query.shape[:-1], length)
    keep = torch.is_grad_enabled()
    return aten._scaled_dot_product_efficient_attention(query, key, value, bias, keep, dropout_p, is_causal, scale=scale)[0]


def _fused_dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Dropout that saves a mask of one byte per element, as on a GPU."""
    return torch.native_dropout(x, p, training)[0] if training and 0 < p < 1 else x
