"""What the log shows of a run: FLOPs, shares and norms counted right, and a whole run with a broken sample among its data."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composer.devices import DeviceCPU
from mlflow import MlflowClient
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from model import config, telemetry, text
from model.finetuning import FinetuneConfig
from model.lamb import LAMB, LAMBConfig
from model.planning import memory_plan
from model.telemetry import PeakMemory, Telemetry, TelemetryConfig
from model.train import TrainConfig

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("yaml", "last"), [("stage1_500m.yaml", "head.*"), ("demo/stage2.yaml", "pixel_head.output.*")])
def test_flops_are_those_of_the_plan_without_any_recomputation(yaml: str, last: str) -> None:
    c = config.load(TrainConfig, ROOT / "yamls" / yaml)
    found = telemetry.flops_per_sample(c.model, c.data.max_tokens)
    plain = replace(c.model, network=replace(c.model.network, checkpoint_blocks=False))
    assert found == telemetry.flops_per_sample(plain, c.data.max_tokens)
    planned = memory_plan.count(c, gpus=2).computation
    # The plan counts the kernels of a GPU, whose fused attention recomputes its scores in the backward pass.
    assert 0.9 < found / (planned.step - planned.recomputation) <= 1
    without = replace(c.model, self_conditioning=0.0)
    assert found - telemetry.flops_per_sample(without, c.data.max_tokens) == planned.first_pass
    part = FinetuneConfig((last,))
    frozen = telemetry.flops_per_sample(c.model, c.data.max_tokens, part)
    tuned = memory_plan.count(replace(c, finetune=part, initialise_from="models:/base@best"), gpus=2).computation
    assert 0.9 < frozen / (tuned.step - tuned.recomputation) <= 1 and found - frozen > 0.9 * planned.backward


def test_what_is_logged_of_an_interval() -> None:
    weight = torch.nn.Parameter(torch.ones(4))
    weights = [weight, *(torch.nn.Parameter(torch.full((4,), float(i))) for i in range(1, 21))]
    optimizer = LAMB(weights, LAMBConfig(lr=0.1, weight_decay=0.0, max_weight_norm=1e9))
    for p in weights:
        p.grad = torch.ones(4)
    optimizer.step()  # the trust ratio of n in every entry is n, and that of ones 1: 1, 1, 2, ..., 20

    logged: list[dict[str, float]] = []
    logger: Any = SimpleNamespace(log_metrics=logged.append)
    rates = torch.tensor([24.0, float("inf"), 8.0, float("inf"), 24.0])
    packed = {"videos": torch.empty(3, 16, 2, 2, 3), "images": torch.empty(2, 1, 2, 2, 3), "frame_rate": rates}
    state: Any = SimpleNamespace(
        timestamp=SimpleNamespace(batch=0), device=DeviceCPU(), optimizers=[optimizer], batch=packed
    )  # fmt: skip
    guard: Any = SimpleNamespace(gradient_norm=0.25)
    memory = PeakMemory(torch.device("cpu"))
    callback = Telemetry(TelemetryConfig(every=2), guard, (24.0, 24.0, 12.0, 8.0), memory, planned=2**28)
    begin = time.perf_counter()
    for step in (1, 2):
        callback.before_dataloader(state, logger)
        time.sleep(0.03)
        callback.after_dataloader(state, logger)
        time.sleep(0.01)
        state.timestamp.batch = step
        callback.batch_end(state, logger)
        if step == 1:
            elapsed = time.perf_counter() - begin
            time.sleep(0.3)  # an evaluation, which is no part of a step
    assert len(logged) == 1
    found = logged[0]
    assert found["optimizer/gradient_norm"] == 0.25
    shares = {rate: found[f"data/share_of_videos_at_{rate}_fps"] for rate in (24, 12, 8)}
    assert shares == pytest.approx({24: 2 / 3, 12: 0, 8: 1 / 3})
    assert found["optimizer/trust_ratio_p50"] == pytest.approx(10, rel=1e-3)
    assert found["optimizer/trust_ratio_p05"] == pytest.approx(1, rel=1e-3)
    assert found["optimizer/trust_ratio_p95"] == pytest.approx(19, rel=1e-3)
    assert found["optimizer/update_norm"] == pytest.approx(0.1 * 2 * sum(n * n for n in (1, *range(1, 21))) ** 0.5, rel=1e-3)
    assert 0.4 < found["throughput/data_wait_share"] < 0.95
    assert found["throughput/frames_per_sec"] == pytest.approx(100 / (2 * elapsed), rel=0.5)  # 50 frames a batch
    assert found["memory/peak_gib"] == pytest.approx(memory.take() / 2**30, abs=0.05)
    assert found["memory/peak_of_plan"] == pytest.approx(4 * found["memory/peak_gib"])


def test_memory_is_what_came_on_top() -> None:
    code = """if True:
        import torch
        from model.telemetry import PeakMemory
        before = torch.ones(2**26)  # a quarter of a GiB, with the imports
        memory = PeakMemory(torch.device("cpu"))
        assert memory.take() < 2**25
        block = torch.ones(2**27)
        del block
        assert 2**29 - 2**23 < memory.take() < 2**29 + 2**26
    """
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_plan_is_held_against_what_was_used() -> None:
    assert telemetry.against_plan(30.0, 40.0, torch.device("cuda")) == (
        "the first steps used 30.00 GiB of the GPU's memory, the plan says 40.00: -25%"
    )
    assert "more than at the start" in telemetry.against_plan(0.5, 0.25, torch.device("cpu"))


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory, write_dataset: Callable[..., Path]) -> Path:
    """Videos and images, one video of which has a caption whose states overflow in the network."""
    folder = tmp_path_factory.mktemp("poisoned")

    def poison(sample: dict[str, Any]) -> None:
        if sample["key"] == "videos-3":
            sample["text"] = text.pack(torch.full((2, 4), 3e38))

    for kind in ("videos", "images"):
        write_dataset(folder / kind, kind, 20, size=(8, 16), frames=12, edit=poison)
    return folder


@pytest.mark.slow
def test_a_run_goes_on_without_a_broken_sample_and_tells_its_operator(tmp_path: Path, training: Any, poisoned: Path) -> None:
    run = replace(training(tmp_path, steps=8), data=poisoned)
    evaluation = "evaluation={every: 4, videos: 3, images: 2, bands: [0.3], batch: 2}"
    run.finish(run.start("faults.policy=skip", "telemetry.every=2", evaluation))
    assert "skipped: the loss is nan; not finite in videos-3; the batch" in run.log
    lists = sorted((tmp_path / "tiny/faults").glob("*.json"))
    assert 1 <= len(lists) <= 2  # 5 batches to an epoch
    assert {s["key"] for s in json.loads(lists[0].read_text())["samples"] if s["loss"] == "nan"} == {"videos-3"}
    assert all(weight.isfinite().all() for weight in run.weights().values())
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    found = client.get_run(client.get_model_version_by_alias("tiny", "newest").run_id).data.metrics
    expected = {
        f"eval/loss/{kind}/{band}" for kind in ("videos", "images") for band in ("sigma_below_0.3", "sigma_above_0.3", "total")
    }
    expected |= {f"optimizer/{name}" for name in ("gradient_norm", "update_norm", "trust_ratio_p05", "trust_ratio_p95")}
    expected |= {"throughput/frames_per_sec", "throughput/data_wait_share", "faults/skipped"}
    assert expected <= found.keys()
    assert found["faults/skipped"] == len(lists)


def saved(run: Any, step: int) -> dict[str, torch.Tensor]:
    """Tensors of a checkpoint, whole, by name: weights, optimiser's state, averages and levels of the loss."""
    folder = next((run.folder / "tiny/checkpoints").glob(f"ep*-ba{step}"))
    dcp_to_torch_save(folder, run.folder / "whole.pt")
    flat, _ = flatten_state_dict(torch.load(run.folder / "whole.pt", weights_only=False))
    parts = ("state.model.", "state.optimizers.", "state.callbacks.EMA.", "state.callbacks.Balance.")
    return {name: value for name, value in flat.items() if name.startswith(parts) and torch.is_tensor(value)}


@pytest.mark.slow
def test_a_run_rolls_back_over_the_steps_before_a_broken_one_and_goes_on(tmp_path: Path, training: Any, poisoned: Path) -> None:
    run = replace(training(tmp_path, steps=11, every=2), data=poisoned)
    overrides = ("faults.policy=roll_back", "checkpoints.keep=9")
    run.finish(run.start(*overrides))
    told = re.compile(r"step (\d+) rolled back to (\d+): the loss is nan; not finite in videos-3; the batch")
    assert told.findall(run.log) == [("4", "2"), ("10", "8")], run.log[-3000:]  # 5 batches to an epoch: in each, another order
    for broken, back in ((4, 2), (10, 8)):
        after, before = saved(run, broken), saved(run, back)
        assert after.keys() == before.keys() and any("exp_avg" in name for name in after)
        assert all(torch.equal(value, before[name]) for name, value in after.items())  # of the step between nothing is left
    assert not all(torch.equal(value, before[name]) for name, value in saved(run, 6).items())
    batches = [json.loads(path.read_text())["samples"] for path in sorted((tmp_path / "tiny/faults").glob("*.json"))]
    assert len(batches) == 2 and batches[0] != batches[1]
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    entry = client.get_run(client.get_model_version_by_alias("tiny", "newest").run_id)
    assert entry.data.metrics["faults/rolled_back"] == 2
    assert len(client.get_metric_history(entry.info.run_id, "loss/train/total")) == 11  # every step once, every batch too

    first = run.weights()
    for checkpoint, again in ((4, [("10", "8")]), (2, [("4", "2"), ("10", "8")])):  # as if killed after, and before it was saved
        begin = len(run.log)
        run.take_back(to=checkpoint)
        run.finish(run.start(*overrides))
        assert told.findall(run.log[begin:]) == again
        assert all(torch.equal(weight, first[name]) for name, weight in run.weights().items())


@pytest.mark.slow
def test_a_run_that_stops_says_why_in_one_line(tmp_path: Path, training: Any, poisoned: Path) -> None:
    run = replace(training(tmp_path, steps=8), data=poisoned)
    assert run.start("faults.policy=stop").wait(timeout=240) == 1
    assert "Traceback" not in run.log
    told = [line for line in run.log.splitlines() if line.startswith("error:")]
    assert len(told) == 1 and "stopped: the loss is nan; not finite in videos-3; the batch's samples are in" in told[0]
    found = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").search_runs(["1"])
    assert [entry.info.status for entry in found] == ["FAILED"]
    assert not list(tmp_path.glob("tiny/model-step-*"))
