"""The operations of a training or sampling step as a GPU would launch them, traced on the meta device. Imports torch alone.

Each operation knows the part of the model that it belongs to, its floating-point operations, and which storages it reads and
writes, so that a roofline (model/planning/roofline.py) can tell what an eager run moves through memory and what is left where
chains of element-wise operations are fused.
"""

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.planning.meta_step import GPUSemantics, Precision, compute_dtype, flop_counter, run_step

aten = torch.ops.aten

Kind = Literal["product", "convolution", "attention", "pointwise"]
PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm}
CONVOLUTIONS = {aten.convolution, aten.convolution_backward}
# Kernels that CUDA launches for one operation, where it is not one.
LAUNCHES = {
    aten.convolution_backward: 2,  # for the input and for the weights
    aten.native_layer_norm_backward: 2,  # for the input and for the weights
    aten.native_group_norm: 2,  # moments, then the normalisation
    aten.native_group_norm_backward: 4,
    aten._scaled_dot_product_flash_attention_backward: 3,  # products of gradients and outputs, the kernel, the sum of dQ
    aten._scaled_dot_product_efficient_attention_backward: 2,
}
FREE = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.detach, aten.is_same_size}
FOREACH_CHUNK, FOREACH_BLOCKS, FOREACH_TENSORS = 65_536, 320, 30  # of ATen's multi_tensor_apply: what one launch takes


@dataclass(frozen=True)
class Operation:
    """One operation of a step; ``reads`` and ``writes`` map storages, numbered in the order of their making, to bytes."""

    name: str
    part: str  # of the model, such as "blocks.read"
    phase: str  # "first pass", "forward", "backward" or "recomputation"; "sampling", "update"
    kind: Kind
    flops: int
    launches: int
    reads: dict[int, int]
    writes: dict[int, int]
    lowered: bool  # in 16 bits, where it is a product, a convolution or attention

    @property
    def bytes(self) -> int:
        """What the operation moves by itself."""
        return sum(self.reads.values()) + sum(self.writes.values())


class Tracer(TorchDispatchMode):
    """Records what runs within. Parts are told by the modules whose forward pass runs; a gradient belongs to the part whose
    operation it is of, which autograd's sequence numbers tell.

    Attributes:
        operations: in their order.
        phase: set by the caller.
    """

    def __init__(self, model: nn.Module, phase: str = "") -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.phase = phase
        self._formulas = flop_counter().flop_registry
        self._parts = _parts(model)
        self._stack: list[nn.Module] = []
        self._part_of: dict[int, str] = {}  # by autograd's sequence number
        self._storages: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}
        self._made = 0  # storages seen so far
        self._hooks: list[Any] = []

    def __enter__(self) -> "Tracer":
        for module in self._parts:
            self._hooks.append(module.register_forward_pre_hook(self._enter_module))
            self._hooks.append(module.register_forward_hook(self._leave_module, always_call=True))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def ignore(self, tensors: Sequence[Tensor]) -> None:
        """Number the storages of ``tensors``, which exist before the step."""
        for tensor in tensors:
            self._number(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        before = self._made
        result = func(*args, **kwargs)
        packet, inputs, outputs = func._overloadpacket, _tensors((args, kwargs)), _tensors(result)
        part, phase = self._place()
        if torch.is_grad_enabled():
            self._part_of[torch._C._autograd._get_sequence_nr() - 1] = part
        written = [tensor for tensor in outputs if self._number(tensor) >= before]
        if func._schema.is_mutable:
            written += [
                t for t, argument in zip(args, func._schema.arguments, strict=False) if _mutable(argument) for t in _tensors(t)
            ]
        if packet in FREE or not written:  # nothing is moved: a view, or memory without contents
            return result
        formula = self._formulas.get(packet)
        self.operations.append(
            Operation(
                name=packet.__name__,
                part=part,
                phase=phase,
                kind=_kind(packet),
                flops=formula(*args, **kwargs, out_val=result) if formula else 0,
                launches=_launches(packet, args),
                reads=self._bytes(inputs),
                writes=self._bytes(written),
                lowered=any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in inputs),
            )
        )
        return result

    def _enter_module(self, module: nn.Module, inputs: Any) -> None:
        self._stack.append(module)

    def _leave_module(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._stack.pop()

    def _place(self) -> tuple[str, str]:
        """The part and the phase that run now."""
        gradients = torch.is_grad_enabled()
        phase = self.phase
        if phase == "forward" and not gradients and self._stack:
            phase = "first pass"
        elif phase == "backward" and gradients:
            phase = "recomputation"
        if self._stack:
            return self._parts[self._stack[-1]], phase
        node: Any = torch._C._current_autograd_node()  # None outside of a backward pass, which its type does not say
        return ("objective" if node is None else self._part_of.get(node._sequence_nr(), "objective")), phase

    def _number(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._storages:
            self._storages[key] = self._made, weakref.ref(storage, lambda _: self._storages.pop(key, None))
            self._made += 1
        return self._storages[key][0]

    def _bytes(self, tensors: Sequence[Tensor]) -> dict[int, int]:
        """By storage; several views of one add up to no more than all of it."""
        moved: dict[int, int] = {}
        for tensor in tensors:
            number, whole = self._number(tensor), tensor.untyped_storage().nbytes()
            moved[number] = min(whole, moved.get(number, 0) + tensor.numel() * tensor.element_size())
        return moved


def trace_step(model: nn.Module, inputs: Callable[[], Any], precision: Precision) -> list[Operation]:
    """The operations of a training step, up to the gradients; arguments as ``meta_step.run_step``'s."""
    tracer = Tracer(model)
    run_step(model, inputs, precision, tracer)
    return tracer.operations


def trace_sampling(model: nn.Module, evaluate: Callable[[], Any], precision: Precision) -> list[Operation]:
    """The operations of ``evaluate()``, which evaluates ``model`` on meta tensors; without gradients."""
    compute = compute_dtype(precision)
    model.to(compute).eval()
    tracer = Tracer(model, "sampling")
    tracer.ignore(list(model.parameters()))
    with torch.no_grad(), tracer, GPUSemantics(None if precision == "fp32" else compute):
        evaluate()
    return tracer.operations


def trace_update(step: Callable[[], Any], weights: Sequence[Tensor]) -> list[Operation]:
    """The operations of ``step()``, an optimiser's or an average's, on ``weights`` with gradients, all on the meta device."""
    tracer = Tracer(nn.Module(), "update")
    tracer.ignore(weights)
    with torch.no_grad(), tracer:
        step()
    return tracer.operations


def _parts(model: nn.Module) -> dict[nn.Module, str]:
    """The part that each module belongs to: the innermost module with modules of its own around it, without numbers."""
    parts = {}
    for name, module in model.named_modules():
        path = [piece for piece in name.split(".") if not piece.isdigit()]
        path = path[1:] if path[:1] == ["network"] else path
        inner = len(path) > 1 and not any(True for _ in module.children())
        parts[module] = ".".join(path[:-1] if inner else path) or "objective"
    return parts


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _mutable(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _kind(packet: Any) -> Kind:
    if packet in PRODUCTS:
        return "product"
    if packet in CONVOLUTIONS:
        return "convolution"
    return "attention" if "scaled_dot_product" in packet.__name__ else "pointwise"


def _launches(packet: Any, args: tuple[Any, ...]) -> int:
    """CUDA kernels of one operation. Of lists of tensors, as many as ATen's multi_tensor_apply makes; where lists differ in shape
    it falls back to one for each tensor."""
    if not packet.__name__.startswith(("_foreach", "_fused")):
        return LAUNCHES.get(packet, 1)
    first, *others = [argument for argument in args if isinstance(argument, list | tuple) and argument]
    alike = all(len(t) == len(first) for t in others) and all(
        tensor.shape == one.shape for each in others for tensor, one in zip(each, first, strict=True) if isinstance(one, Tensor)
    )
    if not alike and packet.__name__.startswith("_foreach"):
        return len(first)
    chunks = sum(math.ceil(tensor.numel() / FOREACH_CHUNK) for tensor in first)
    return max(math.ceil(chunks / FOREACH_BLOCKS), math.ceil(len(first) / FOREACH_TENSORS))
