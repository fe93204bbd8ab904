"""The parts "learning" and "precision" of bench/gpu.py, rehearsed on the CPU: what clips show, what is measured, what resumes."""

import itertools
import json
import math
import os
import subprocess
import sys
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from bench.on_gpu import device_tests, learning, precision, scenes
from bench.on_gpu.record import Record
from bench.on_gpu.scenes import Batches, Rendered, rendered, text_states
from bench.on_gpu.training import NOISE, Training, errors
from dataprep import moving_scenes
from model.codec import to_pixels
from model.denoiser import Denoiser
from model.networks.fit.config import FITConfig
from model.planning.meta_step import count_step
from pipelines.judge import parse
from pipelines.scoring import Clip, score

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
HOUR = 3600.0  # seconds: of time enough, on any machine
ABSENT = ("composer", "streaming", "omegaconf", "pydantic", "transformers", "mlflow", "pyspark", "torchmetrics", "av", "yaml")


@pytest.fixture(scope="module")
def clips() -> Rendered:
    """Of stage 1's size."""
    return rendered("seen", 3, 24, 16, 36, CPU)


@pytest.fixture
def one_thread():
    """The models here are so small that threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def everything_finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(everything_finite(part) for part in value.values())
    if isinstance(value, list):
        return all(everything_finite(part) for part in value)
    return not isinstance(value, float) or math.isfinite(value)


def test_runs_where_composer_is_not_installed() -> None:
    code = f"import sys\nfor name in {ABSENT}: sys.modules[name] = None\nfrom bench.on_gpu import learning, precision"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_captions_are_told_apart_by_their_words_and_by_their_order() -> None:
    captions = [
        "a red circle moves left on a blue background",
        "a red circle moves right on a blue background",
        "a blue circle moves left on a red background",  # the same words
        "a red circle on a blue background",
    ]
    states, mask = text_states(captions, 32)
    assert mask.sum(dim=1).tolist() == [len(caption.split()) for caption in captions]
    assert not states[~mask].any()
    assert states[mask].std().item() == pytest.approx(1, abs=0.1)
    differs = (states[0] != states[1]).any(dim=1)
    assert differs.nonzero().flatten().tolist() == [4]
    assert torch.equal(states[0, 7], text_states([captions[3]], 32)[0][0, 5]) is False  # "blue" at another place
    # Whoever looks at tokens one by one, without their order, still finds others.
    tokens = [{tuple(token) for token in states[row][mask[row]].tolist()} for row in (0, 2)]
    assert len(tokens[0] ^ tokens[1]) == 4


def test_states_are_the_same_in_every_process() -> None:
    caption = "a white square stays still on a green background"
    code = f"from bench.on_gpu.scenes import text_states; print(text_states([{caption!r}], 8)[0].flatten().tolist())"
    environment = {**os.environ, "PYTHONHASHSEED": "5"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == text_states([caption], 8)[0].flatten().tolist()


def test_batches_show_what_their_captions_say(clips: Rendered) -> None:
    batch = Batches(clips, 32).draw(32, torch.Generator().manual_seed(0), 0.25)
    said = [*clips.captions, *clips.still_captions]
    states = text_states(said, 32)[0]
    images, videos = [], []
    pairs = zip(to_pixels(batch["video"]).numpy(), batch["text"], batch["frame_rate"].tolist(), strict=True)
    for frames, text, rate in pairs:
        caption = said[int((states - text).abs().sum(dim=(1, 2)).argmin())]
        if math.isinf(rate):
            assert (frames == frames[0]).all()
            images.append(Clip(frames[:1], caption, 1))
        else:
            assert rate in scenes.RATES
            videos.append(Clip(frames, caption, rate))
    assert (len(images), len(videos)) == (8, 24)
    for found, number, properties in ((score(videos), 24, {"direction", "speed"}), (score(images), 8, set())):
        right = {rate.name: (rate.right, rate.number) for rate in found.rates}
        assert {"background", "count", "colour", "shape", "all"} | properties == set(right)
        assert all(all_of_them == out_of for all_of_them, out_of in right.values())
        assert right["all"] == (number, number)
    assert len(set(batch["seed"])) == 32
    assert batch["video"].min() >= -1 and batch["video"].max() <= 1


def test_new_combinations_are_in_no_clip_to_train_on() -> None:
    plan = replace(learning.tiny_plan(), pool=400, held_out=40)
    asked = learning.held_out(plan, CPU)

    def combinations(captions: list[str]) -> set[tuple[str, str, str]]:
        truths = [parse(caption).objects[0] for caption in captions]
        return {(said.colour, said.shape, str(said.direction)) for said in truths}

    trained = combinations(learning.pool(plan, CPU).clips.captions)
    assert trained <= set(moving_scenes.combinations("seen")) and len(trained) > 60
    assert combinations(asked["seen"].clips.captions) <= set(moving_scenes.combinations("seen"))
    assert combinations(asked["new"].clips.captions) <= set(moving_scenes.combinations("unseen"))


def test_held_out_clips_are_not_those_to_train_on() -> None:
    plan = learning.tiny_plan()
    trained = {clip.numpy().tobytes() for clip in learning.pool(plan, CPU).clips.frames}
    assert len(trained) == plan.pool
    assert not trained & {clip.numpy().tobytes() for clip in learning.held_out(plan, CPU)["seen"].clips.frames}


def test_processes_render_what_one_renders(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = rendered("seen", 5, 20, 4, 9, CPU)
    monkeypatch.setattr(scenes, "ALONE", 8)
    monkeypatch.setattr(scenes, "CHUNK", 8)
    together = rendered("seen", 5, 20, 4, 9, CPU)
    assert torch.equal(alone.frames, together.frames) and torch.equal(alone.rates, together.rates)
    assert (alone.captions, alone.still_captions) == (together.captions, together.still_captions)


def test_what_cannot_be_rendered_is_refused() -> None:
    with pytest.raises(ValueError, match="16:9"):
        rendered("seen", 0, 1, 16, 40, CPU)
    with pytest.raises(ValueError, match="18 frames"):
        rendered("seen", 0, 1, 18, 36, CPU)
    with pytest.raises(ValueError, match="words"):
        text_states(["a " * 17], 8)


def test_the_network_is_the_papers_and_has_the_size_that_is_told() -> None:
    model = learning.full().model
    assert isinstance(model.network, FITConfig)
    table_8 = {
        "size", "patch_width", "latent_tokens", "latent_width", "blocks", "global_layers", "patch_head_width",
        "latent_head_width", "conditioning_width", "text_width",
    }  # fmt: skip
    changed = {f.name for f in fields(FITConfig) if getattr(model.network, f.name) != getattr(FITConfig(), f.name)}
    assert changed <= table_8
    assert (model.diffusion.sigma_in, model.self_conditioning, model.text_dropout) == (4.0, 0.9, 0.1)
    assert model.uncertainty_weighting is False
    clip = Batches(rendered("seen", 0, 1, 16, 36, CPU), 128)
    counted = count_step(Denoiser(model, "meta"), lambda: learning._on_meta(clip), "amp_bf16")
    assert (counted.first_pass + counted.forward + counted.backward) / 1e9 == pytest.approx(125, abs=3)
    assert sum(p.numel() for p in Denoiser(model, "meta").parameters()) / 1e6 == pytest.approx(32, abs=0.5)


def test_the_recipe_brings_the_errors_down(one_thread: None) -> None:
    plan = learning.tiny_plan()
    asked = learning.held_out(plan, CPU)["seen"]
    training = Training(plan.model, replace(plan.recipe, batch=16), learning.pool(plan, CPU), None, compiled=False)
    before = errors(training.average, asked, 4)
    assert list(before) == [f"{level:g}" for level in NOISE]
    for step in range(250):
        training.step(step / 250)
    after = errors(training.average, asked, 4)
    assert all(after[level] < 0.7 * before[level] for level in ("1", "2", "4"))
    assert training.optimizer.param_groups[0]["lr"] < 1e-6  # the cosine has come to its end


def test_precisions_differ_by_rounding_alone(one_thread: None) -> None:
    plan = precision.plan_of(CPU, tiny=True)
    clips = learning.pool(plan, CPU)

    def trained(dtype: torch.dtype | None) -> tuple[list[float], dict[str, torch.Tensor]]:
        training = Training(plan.model, plan.recipe, clips, dtype, compiled=False)
        before = {name: weight.clone() for name, weight in training.denoiser.state_dict().items()}
        losses = [float(training.step(0.0)) for _ in range(8)]
        return losses, {name: weight - before[name] for name, weight in training.denoiser.state_dict().items()}

    losses, moved = trained(None)
    assert losses == trained(None)[0]
    assert len({round(loss, 4) for loss in losses}) == 8  # of other clips and other noise at each step
    lowered, moved_lowered = trained(torch.bfloat16)
    assert lowered == pytest.approx(losses, rel=1e-3) and lowered != losses
    # Each weight trains, too: autocast's cache had left most without gradients, and the losses within 1 %.
    for name, change in moved.items():
        assert float(moved_lowered[name].norm()) == pytest.approx(float(change.norm()), rel=0.3), name


def test_learning_measures_everything_once(tmp_path: Path, one_thread: None) -> None:
    path = tmp_path / "learning.jsonl"
    learning.run(Record(path), CPU, True, HOUR)
    rows = Record(path).rows
    plan = learning.tiny_plan()
    names = Counter(next(iter(row["key"])) for row in rows)
    assert names == {"rendered": 1, "step": 2, "trained": 1, "clips": 4}
    assert everything_finite(rows)
    trained = next(row for row in rows if "trained" in row["key"])
    assert trained["parameters"] == sum(p.numel() for p in Denoiser(plan.model, "meta").parameters())
    assert trained["errors"] != trained["errors_new"] and trained["errors"] != trained["errors_other_captions"]
    for row in (row for row in rows if "clips" in row["key"]):
        assert set(row["right"]) >= {"background", "count", "colour", "shape", "direction", "all"}
        assert row["right"]["all"]["number"] == plan.held_out
        assert path.with_name(f"learning-{row['key']['clips']}-{row['key']['guidance']:g}.png").exists()
    told = "\n".join(learning.report(rows))
    for figure in (f"{rows[1]['loss']:.4f}", f"{trained['errors_new']['4']:.4f}", "8 steps", "new combinations", "direction"):
        assert figure in told
    learning.run(Record(path), CPU, True, HOUR)
    assert Record(path).rows == rows


def test_sampling_goes_on_from_the_weights_of_a_whole_training(tmp_path: Path, one_thread: None) -> None:
    path = tmp_path / "learning.jsonl"
    learning.run(Record(path), CPU, True, HOUR)
    whole = Record(path).rows
    path.write_text("".join(json.dumps(row) + "\n" for row in whole[:-1]))
    learning.run(Record(path), CPU, True, HOUR)
    again = Record(path).rows
    assert again[:-1] == whole[:-1]
    assert {**again[-1], "seconds": 0} == {**whole[-1], "seconds": 0}
    path.write_text("".join(json.dumps(row) + "\n" for row in whole[:-1]))
    path.with_suffix(".safetensors").unlink()  # then all of it is done again
    learning.run(Record(path), CPU, True, HOUR)
    assert [row["key"] for row in Record(path).rows] == [row["key"] for row in whole]


def test_a_training_that_was_cut_short_begins_again(tmp_path: Path, one_thread: None) -> None:
    path = tmp_path / "learning.jsonl"
    Record(path).add({"step": 4}, loss=123.0)
    learning.run(Record(path), CPU, True, HOUR)
    rows = Record(path).rows
    assert [row["loss"] for row in rows if row["key"] == {"step": 4}] != [123.0]
    assert len(rows) == 8
    assert load_file(path.with_suffix(".safetensors")).keys() == Denoiser(learning.tiny_plan().model, "meta").state_dict().keys()


def test_training_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    plan = replace(learning.tiny_plan(), steps=None, guidances=(1.5,))
    monkeypatch.setattr(learning, "tiny_plan", lambda: plan)
    monkeypatch.setattr(learning, "KEPT_BACK", 0.6)
    ticks = itertools.count(0, 0.05)  # seconds: each look at the clock finds it so much later, however busy the machine is
    monkeypatch.setattr(learning, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    record = Record(tmp_path / "learning.jsonl")
    learning.run(record, CPU, True, 5)
    trained = next(row for row in record.rows if "trained" in row["key"])
    assert trained["seconds"] < 2.2 and trained["key"]["trained"] > 20
    assert record.find(clips="new", guidance=1.5)  # in the time kept back


def test_a_sheet_shows_the_clips(clips: Rendered, tmp_path: Path) -> None:
    learning.sheet(clips.frames[:3], clips.captions, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as picture:
        pixels = np.asarray(picture)
    strips = pixels.reshape(3, 14 + 72, -1, 3)  # of text and of frames, twice as large
    for strip, clip in zip(strips, clips.frames[:3, ::2].numpy(), strict=True):
        tiles = strip[14:].reshape(72, 8, 128 + 2, 3).swapaxes(0, 1)
        assert (tiles[:, ::2, :128:2] == clip).all() and (tiles[:, 1::2, 1:128:2] == clip).all()
        assert (strip[:14] < 128).any(axis=(0, 2)).sum() > 50  # the caption


def test_precision_measures_everything_once(tmp_path: Path, one_thread: None) -> None:
    path = tmp_path / "precision.jsonl"
    precision.run(Record(path), CPU, True, HOUR)
    rows = Record(path).rows
    assert Counter(next(iter(row["key"])) for row in rows) == {"curve": 3, "apart": 2, "tests": 1}
    assert everything_finite(rows)
    curves = {row["key"]["curve"]: row for row in rows if "curve" in row["key"]}
    assert all(len(row["losses"]) == 3 for row in curves.values())
    assert curves["TF32"]["losses"] == curves["float32"]["losses"]  # a CPU has none
    apart = {row["key"]["apart"]: row for row in rows if "apart" in row["key"]}
    assert apart["TF32"]["losses"] == apart["TF32"]["errors"] == 0
    assert 0 < abs(apart["bfloat16"]["losses"]) < 0.002
    tests = next(row for row in rows if "tests" in row["key"])
    assert (tests["failed"], tests["why"]) == ([], None) and tests["passed"] > 0
    told = "\n".join(precision.report(rows))
    assert f"{curves['bfloat16']['losses'][0]:.4f}" in told and f"{tests['passed']} passed" in told and "errors +0.0%" in told
    precision.run(Record(path), CPU, True, HOUR)
    assert Record(path).rows == rows


def test_what_tests_say_is_read_also_where_it_was_cut_off() -> None:
    told = """collected 9 items
tests/model/networks/test_layers.py::test_a[two words] PASSED           [  5%]
tests/model/networks/test_layers.py::test_b FAILED                      [ 10%]
[gw0] [ 12%] PASSED tests/model/diffusion/test_edm.py::test_c[1-True]
[gw1] [ 13%] ERROR tests/model/diffusion/test_edm.py::test_d
FAILED tests/model/networks/test_layers.py::test_b - AssertionError: assert 1 == 2
tests/model/networks/test_layers.py::test_that_was_running"""
    layers, edm = "tests/model/networks/test_layers.py", "tests/model/diffusion/test_edm.py"
    assert device_tests.outcomes_of(told) == {
        f"{layers}::test_a[two words]": "PASSED",
        f"{layers}::test_b": "FAILED",
        f"{edm}::test_c[1-True]": "PASSED",
        f"{edm}::test_d": "ERROR",
    }


def test_tests_that_take_too_long_are_cut_off() -> None:
    found = device_tests.run_tests("cpu", "compile", 0.5)
    assert (found["passed"], found["why"]) == (0, "cut off after 0 s")


def test_tests_that_do_not_run_say_why() -> None:
    found = device_tests.run_tests("cpu", "test_that_is_not_there", HOUR)
    assert (found["passed"], found["failed"]) == (0, []) and "deselected" in found["why"]
    assert found["why"] in precision.report([{"key": {"tests": "eager"}, **found}])[0]
