"""What can be known of the GPU's hour without a GPU: ``python -m bench.on_gpu.rehearsal``.

Every model of the bench goes through a training step, an evaluation and an update as a GPU would, on the meta device with CUDA's
semantics (model/planning/meta_step.py). What is printed are the attention kernels that CUDA would take. What makes the host wait
for the device is refused: reading a value there, or moving a tensor from one to the other. The compiler must take blocks whole.

Fake tensors on a ``cuda`` device would be nearer to the real ones, but without a driver torch's CUDA build ends the process at
the first of them that is copied, and its CPU build has no such device to guard.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.on_gpu.learning import full
from bench.on_gpu.subjects import FIT_3_9B, FIT_500M, UNET_284M, UPSAMPLER, WALT, batch_of, evaluation_of
from model import optimizers
from model.denoiser import Denoiser, ModelConfig
from model.gradients import clip, whole_norms
from model.lamb import LAMBConfig
from model.planning.meta_step import gathered_dtypes
from model.planning.trace import Operation, trace_sampling, trace_step

BACKENDS = {"_flash_": "flash", "_efficient_": "memory-efficient"}


@dataclass(frozen=True)
class Rehearsed:
    """One model's steps."""

    name: str
    training: int  # operations
    sampling: int
    attention: dict[str, int]  # by backend, of both steps
    graphs: int  # that the compiler made of the blocks, each whole


class NoHostTraffic(TorchDispatchMode):
    """Refuses, within, what makes the host wait for the device: tensors that go from one to the other."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        devices = {leaf.device.type for leaf in tree_leaves((args, result)) if isinstance(leaf, Tensor) and leaf.ndim}
        if len(devices) > 1:
            raise RuntimeError(f"{func} moves a tensor between host and device")
        return result


def rehearse(name: str, model: ModelConfig, videos: int = 2) -> Rehearsed:
    """All of a model's steps.

    Raises:
        RuntimeError: the host reads a value or moves a tensor in a step, or a block breaks the compiler's graph.
    """
    clips = batch_of(model, videos, "meta")
    evaluated, arguments = Denoiser(model, "meta"), evaluation_of(model, clips)
    with NoHostTraffic():
        training = trace_step(Denoiser(model, "meta"), lambda: clips, "amp_bf16")
        sampling = trace_sampling(evaluated, lambda: evaluated.denoise(*arguments), "amp_bf16")
        _update(Denoiser(model, "meta"))
    return Rehearsed(name, len(training), len(sampling), _attention([*training, *sampling]), _graphs(model, clips))


def _update(denoiser: Denoiser) -> None:
    """Clipping, LAMB and the average, twice: the first step makes the state."""
    weights: list[Tensor] = list(denoiser.parameters())
    optimizer, average = optimizers.build(weights, LAMBConfig()), [torch.empty_like(p) for p in weights]
    for _ in range(2):
        gradients = [torch.empty_like(p) for p in weights]
        for p, gradient in zip(weights, gradients, strict=True):
            p.grad = gradient
        clip(gradients, whole_norms(weights, gradients)[0].norm(), 0.5)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, weights, 0.01)


def _attention(operations: list[Operation]) -> dict[str, int]:
    names = [o.name for o in operations if o.kind == "attention" and not o.name.endswith("_backward")]
    return dict(Counter(kind for name in names for part, kind in BACKENDS.items() if part in name))


def _graphs(model: ModelConfig, clips: dict[str, Any]) -> int:
    """Compile each block whole and run a training step; returns the number of graphs."""
    denoiser = Denoiser(model, "meta")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    before = torch.is_autocast_enabled("cuda")
    with gathered_dtypes(denoiser, "amp_bf16"):
        denoiser.network.compile_blocks(backend="eager")  # whose graphs are the real backend's
        try:
            torch.set_autocast_enabled("cuda", True)
            denoiser.loss(denoiser(clips), clips).backward()
        finally:
            torch.set_autocast_enabled("cuda", before)
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def main() -> None:
    models = {subject.name: subject.model for subject in (FIT_500M, UNET_284M, FIT_3_9B, UPSAMPLER, *WALT)}
    print(f"{'model':26}{'training':>10}{'sampling':>10}{'graphs':>8}  attention (operations, none waits for the host)")
    for name, model in {**models, "FIT of part learning": full().model}.items():
        found = rehearse(name, model)
        kinds = ", ".join(f"{number} {kind}" for kind, number in found.attention.items())
        print(f"{name:26}{found.training:10,}{found.sampling:10,}{found.graphs:8}  {kinds}", flush=True)


if __name__ == "__main__":
    main()
