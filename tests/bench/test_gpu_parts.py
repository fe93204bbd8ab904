"""What the parts of bench/gpu.py measure, and what their tables say."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bench.on_gpu import memory, optimizers, speed, speed_report, subjects, walt
from bench.on_gpu.subjects import FIT_500M, MEMORY, SPEED, UNET_284M, UPSAMPLER, SharedDraws, Subject, batch_of, shrunk
from model import config
from model.denoiser import Denoiser
from model.planning import memory_plan
from model.train import TrainConfig

YAMLS = Path(__file__).parents[2] / "yamls"
ALL = {subject.name: subject for subject in (*SPEED, *(subject for subject, _ in MEMORY))}
CPU = torch.device("cpu")


@pytest.mark.parametrize("subject", ALL.values(), ids=ALL)
def test_a_subject_is_what_its_yaml_says(subject: Subject) -> None:
    c = config.load(TrainConfig, YAMLS / subject.yaml)
    assert subject.model == c.model
    assert subject.optimizer == c.optimizer
    assert c.data.max_tokens == subjects.TEXT_TOKENS and c.precision == "amp_bf16"


def test_the_small_models_memory_is_measured_in_the_microbatches_of_their_yamls() -> None:
    for subject, videos in MEMORY[2:]:
        assert videos == config.load(TrainConfig, YAMLS / subject.yaml).microbatch


@pytest.mark.parametrize("subject", [FIT_500M, UNET_284M], ids=lambda subject: subject.name)
def test_the_plan_of_a_step_is_that_of_training_but_for_the_loaders_batch(subject: Subject) -> None:
    overrides = ("global_batch=2", "microbatch=1")
    planned = memory_plan.count(config.load(TrainConfig, YAMLS / subject.yaml, overrides), gpus=1).memory
    ours = memory.planned(subject, 1)
    # The trainer's batch has text and masks as ours, and is held twice there: as it was loaded, and as the model sees it.
    assert ours.state == planned.state and ours.gathered == planned.gathered and ours.reducing == planned.reducing
    assert ours.training == pytest.approx(planned.training - planned.batch, rel=1e-3)
    assert ours.update == pytest.approx(planned.update - planned.batch, rel=1e-3)


def test_batches_double_until_that_does_not_help() -> None:
    sizes = [16, 32, 64]
    assert speed.next_size({}, sizes) == 16
    assert speed.next_size({16: {"ms": 1.0}}, sizes) == 32
    assert speed.next_size({16: {"ms": 1.0}, 32: {"ms": 0.96}}, sizes) == 64
    assert speed.next_size({16: {"ms": 1.0}, 32: {"ms": 0.98}}, sizes) is None
    assert speed.next_size({16: {"ms": 1.0}, 32: {"ms": 1.1}}, sizes) is None
    assert speed.next_size({16: {"ms": 1.0}, 32: {"out_of_memory": True}}, sizes) is None
    assert speed.next_size({16: {"ms": 1.0}, 32: {"ms": 0.5}, 64: {"ms": 0.2}}, sizes) is None
    assert speed.doubled(16) == [16, 32, 64, 128, 256, 512]


def test_a_network_that_fails_leaves_a_row_that_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = speed.Record(tmp_path / "speed.jsonl")
    errors = iter([torch.OutOfMemoryError("CUDA out of memory. Tried"), RuntimeError("capture failed\nmore")])

    def fail(*_: Any) -> None:
        raise next(errors)

    monkeypatch.setattr(speed.Rival, "_train", fail)
    with pytest.raises(RuntimeError, match="capture failed"):
        speed.run(record, CPU, True, 1000.0)
    told = [{name: value for name, value in row.items() if name != "key"} for row in record.rows if "subject" in row["key"]]
    assert told == [{"out_of_memory": True}, {"failed": "capture failed"}]
    assert [line.split()[-1] for line in speed.report(record.rows) if "batch" not in line][-3:-1] == ["memory", "failed"]


def row(subject: str, step: str, mode: str, batch: int, ms: float, of_peak: float = 0.3) -> dict[str, Any]:
    key = {"subject": subject, "step": step, "mode": mode, "batch": batch}
    return {"key": key, "ms": ms, "spread": 0.01, "tflop": 2.0, "tflops": 400.0, "of_peak": of_peak, "memory_gib": 50.0}


def test_ratios_are_of_the_best_batches_of_modes_in_which_both_ran() -> None:
    rows = [
        row("FIT 500M", "training", "eager", 16, 12.0),
        row("U-Net 284M", "training", "eager", 16, 40.0),
        row("FIT 500M", "training", "eager", 32, 10.0),
        row("FIT 500M", "training", "compiled", 32, 7.0, of_peak=0.52),
        row("U-Net 284M", "training", "compiled", 16, 35.0),
        row("FIT 500M", "training", "compiled, graph", 32, 5.0),
        row("FIT 500M", "sampling", "eager", 16, 2.0),
    ]
    lines = speed_report.report(rows)
    assert (
        "training: speed of FIT 500M over U-Net 284M: eager 4.00, compiled 5.00, each at its best 5.00 "
        "(aim 4.5; the paper, on an A100: 3.31)" in lines
    )
    assert lines[-1] == "training FIT 500M reaches 52% of the matrix product's rate (aim 50%)"
    assert not any(line.startswith("sampling:") for line in lines), "the U-Net has not sampled"
    assert sum("  16  " in line or "  32  " in line for line in lines) == 6, "of FIT's eager batches the best alone"


def test_an_evaluation_is_the_samplers_and_a_training_step_leaves_no_gradients() -> None:
    for subject in map(shrunk, (FIT_500M, UNET_284M, UPSAMPLER)):
        rival = speed.Rival(subject, CPU, "fp32")
        frames, height, width = subject.model.network.size
        with torch.no_grad():
            estimate = rival.step("sampling", 2, graph=False)()
        assert estimate.shape == (2, frames, 3, height, width) and estimate.isfinite().all()
        parameters, norms = list(rival.denoiser.parameters()), list[float]()
        for p in parameters:
            p.register_post_accumulate_grad_hook(lambda p, norms=norms: norms.append(float(p.grad.norm())))
        rival.step("training", 2, graph=False)()
        assert len(norms) == len(parameters)
        # But for what this batch may not need, the null text: a GPU computes faster with zeros than with a run's numbers.
        assert sum(norm > 0 for norm in norms) >= len(norms) - 1
        assert all(p.grad is None for p in rival.denoiser.parameters())


def test_shared_draws_are_those_that_the_denoiser_asks_for() -> None:
    model = shrunk(FIT_500M).model
    torch.manual_seed(0)
    denoiser = Denoiser(model)
    batch = batch_of(model, 64, "cpu")
    terms = denoiser(batch, SharedDraws(64, CPU))
    sigma = terms.sigma.log()
    assert terms.loss.isfinite().all() and len(sigma.unique()) == 64
    assert sigma.mean().item() == pytest.approx(model.diffusion.log_sigma_mean, abs=4 * model.diffusion.log_sigma_std / 8)
    assert SharedDraws(1000, CPU).uniform().min() >= 0 and SharedDraws(1000, CPU).uniform().max() < 1


def test_memorys_table_holds_the_peak_against_the_plan() -> None:
    plan, key = {"training": 80.0, "update": 72.0, "total": 80.0}, {"subject": "FIT 3.9B", "videos": 1}
    peak = {"training": 76.0, "update": 70.0, "total": 76.0}
    measured = {"key": key, "plan_gib": plan, "seconds": {"training": 0.4, "update": 0.1}, "peak_gib": peak}
    refused = {"key": {**key, "subject": "FIT 3.9B Up"}, "plan_gib": plan, "too_large": "not tried: by the plan it takes 80 GiB"}
    lines = memory.report([measured, refused])
    assert lines[2].split() == ["FIT", "3.9B", "1", "0.400", "0.100", "76.00", "70.00", "80.00", "72.00", "0.950"]
    assert "not tried: by the plan it takes 80 GiB" in lines[3]
    assert lines[-1] == "aim: a peak within 10% of the plan"


def test_what_does_not_fit_is_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    record = memory.Record(tmp_path / "memory.jsonl")
    memory.run(record, CPU, True, 1000.0)
    assert [row["too_large"].startswith("not tried: by the plan it takes 0.0 GiB of 0.0") for row in record.rows] == [True] * 4


def test_optimizers_table_compares_lamb_with_torchs_fused_adamw() -> None:
    times = {"LAMB": 6.0, "AdamW, torch's fused": 5.0, "copy": 2.0}
    rows: list[dict[str, Any]] = [
        {"key": {"work": name}, "ms": ms, "spread": 0.1, "weight_bytes": 4_000_000} for name, ms in times.items()
    ]
    rows.append({"key": {"kernels": "LAMB"}, "launches": 120})
    lines = optimizers.report(rows)
    assert lines[0] == "1 M weights in float32; the copy moves 0.004 TB/s"
    assert lines[2].split() == ["LAMB", "6.000", "10%", "3.00", "120"]
    assert lines[-1] == "LAMB takes 1.20 times torch's fused AdamW (aim 1.25)"


def test_walt_measures_what_is_listed_as_speed_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = speed.Record(tmp_path / "walt.jsonl")
    walt.run(record, CPU, True, 1000.0)
    assert record.rows == [] and walt.report([]) == ["nothing to measure: no W.A.L.T. in this checkout"]
    monkeypatch.setattr(walt, "WALT", (FIT_500M,))
    walt.run(record, CPU, True, 1000.0)
    assert {row["key"]["subject"] for row in record.rows if "subject" in row["key"]} == {"FIT 500M"}
    assert walt.report(record.rows) == speed.report(record.rows)
