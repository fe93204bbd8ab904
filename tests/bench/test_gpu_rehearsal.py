"""The rehearsal without a GPU: it passes for what is shipped, and sees what it is there for."""

import pytest
import torch
from torch import Tensor

from bench.on_gpu import rehearsal
from bench.on_gpu.rehearsal import NoHostTraffic, rehearse
from bench.on_gpu.subjects import FIT_3_9B, FIT_500M, UNET_284M, UPSAMPLER, Subject, shrunk
from model.networks.fit.network import FITBlock, GlobalLayer

SUBJECTS = [FIT_500M, UNET_284M, FIT_3_9B, UPSAMPLER]


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_every_subject_is_rehearsed_in_miniature(subject: Subject) -> None:
    found = rehearse(subject.name, shrunk(subject).model)
    assert found.training > found.sampling > 100
    assert found.graphs > 0
    # Text alone has a mask, which flash attention does not take.
    assert found.attention["flash"] > 0 and found.attention["memory-efficient"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_every_subject_is_rehearsed_at_full_size(subject: Subject) -> None:
    assert rehearse(subject.name, subject.model).graphs > 0


def test_a_step_that_reads_a_value_on_the_host_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = GlobalLayer.forward

    def reading(self: GlobalLayer, latents: Tensor) -> Tensor:
        return plain(self, latents) * float(latents.mean())

    monkeypatch.setattr(GlobalLayer, "forward", reading)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        rehearse("reading", shrunk(FIT_500M).model)


def test_tensors_that_go_from_host_to_device_are_refused() -> None:
    with NoHostTraffic():
        torch.ones(3, device="meta") * torch.tensor(2.0)  # a number of the host's goes along with the kernel
        with pytest.raises(RuntimeError, match="between host and device"):
            torch.ones(3).to("meta")


def test_a_block_that_breaks_the_graph_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = FITBlock.compute

    def broken(self: FITBlock, *arguments: Tensor) -> tuple[Tensor, Tensor]:
        torch._dynamo.graph_break()
        return plain(self, *arguments)

    monkeypatch.setattr(FITBlock, "compute", broken)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        rehearsal._graphs(shrunk(FIT_500M).model, rehearsal.batch_of(shrunk(FIT_500M).model, 2, "meta"))
