"""A sampling job's folder against a real dataset, with small extractors and a small CLIP in their real formats."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from streaming import MDSWriter
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from model import command, config, media, text
from model.data import schema
from model.data.batch import Sample
from model.data.schema import Manifest, TextManifest
from model.errors import UserError
from model.registry import TrackingConfig
from pipelines import unfinished
from pipelines.clips import RealClips
from pipelines.evaluate import ClipModelConfig, EvaluateConfig, evaluate
from pipelines.metrics import ClipSimilarity, ExtractorConfig
from pipelines.results import PublishedConfig

ROOT = Path(__file__).parents[2]
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}


class Moments(nn.Module):
    """Mean and spread of each colour."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        return torch.cat([flat.mean(2), flat.std(2)], 1)


def picture(colour: str, seed: int, frames: int) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(-20, 20, (frames, 18, 32, 1))
    return np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of 12 real clips."""
    folder = tmp_path_factory.mktemp("real")
    with MDSWriter(out=str(folder), columns=schema.COLUMNS, hashes=["xxh64"]) as writer:
        for number in range(12):
            frames = picture(list(COLOURS)[number % 3], number, 6)
            writer.write(
                {
                    "key": f"{number}",
                    "caption": list(COLOURS)[number % 3],
                    "frames": frames.tobytes(),
                    "frame_ends": (np.arange(1, 7) * frames[0].size).astype(np.uint32),
                    "start_seconds": 0.0,
                    "source_height": 18,
                    "source_width": 32,
                    "text": text.pack(torch.zeros(2, 4)),
                }
            )
    Manifest("videos", 18, 32, 24.0, 6, "raw", 12, TextManifest("encoder", "r", 4, "bfloat16", 8)).write(folder)
    return folder


@pytest.fixture(scope="module")
def extractor(tmp_path_factory: pytest.TempPathFactory) -> ExtractorConfig:
    path = tmp_path_factory.mktemp("extractors") / "moments.pt"
    torch.jit.script(Moments()).save(str(path))
    return ExtractorConfig(str(path), hashlib.sha256(path.read_bytes()).hexdigest(), values="unit")


@pytest.fixture
def generated(tmp_path: Path) -> Callable[..., Path]:
    """``generated(colours, seed)``: the folder of a sampling job."""

    def write(*colours: str, seed: int = 100, frames: int = 4, frame_rate: float = 24.0) -> Path:
        folder = tmp_path / f"job-{'-'.join(colours)}-{seed}"
        records = []
        for number, colour in enumerate(colours * 4):
            media.write_mp4(folder / f"{number}.mp4", picture(colour, seed + number, frames), frame_rate)
            records.append({"file": f"{number}.mp4", "prompt": colour, "seed": number})
        (folder / "samples.json").write_text(json.dumps({"clips": records}))
        return folder

    return write


def results(folder: Path) -> dict[str, dict[str, float]]:
    return {entry["metric"]: entry for entry in json.loads((folder / "evaluation.json").read_text())["results"]}


def test_distances_tell_right_clips_from_wrong_ones(
    reference: Path,
    extractor: ExtractorConfig,
    generated: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right, wrong = generated("red", "green", "blue"), generated("green")
    store = TrackingConfig(f"sqlite:///{tmp_path}/mlflow.db", "evaluation", str(tmp_path / "artifacts"))
    job = EvaluateConfig(
        str(right),
        str(reference),
        fid=extractor,
        fvd=replace(extractor, kind="video"),
        inception=extractor,
        frames=4,
        image_frames=2,
        splits=2,
        batch=5,
        cache=str(tmp_path / "cache"),
        device="cpu",
        tracking=store,
    )
    evaluate(job)
    kept = sorted((tmp_path / "cache").iterdir())
    assert [path.name[:3] for path in kept] == ["fid", "fvd"]
    evaluate(replace(job, generated=str(wrong), tracking=None))
    assert sorted((tmp_path / "cache").iterdir()) == kept, "the sums over the real clips are taken up"
    good, bad = results(right), results(wrong)
    assert (good["fid"]["samples"], good["fid"]["reference_samples"]) == (24, 24)
    assert (good["fvd"]["samples"], good["fvd"]["reference_samples"]) == (12, 12)
    for metric in ("fid", "fvd"):
        assert 0 <= good[metric]["value"] < 0.1 * bad[metric]["value"]
    assert "24 samples against 24 real; 2 frames of each clip" in capsys.readouterr().out
    client = MlflowClient(store.uri)
    (run,) = client.search_runs([client.get_experiment_by_name("evaluation").experiment_id])
    assert run.data.metrics["evaluation/fvd"] == good["fvd"]["value"]
    kept[0].write_bytes(b"cut short")
    evaluate(replace(job, tracking=None))
    assert results(right)["fid"]["value"] == pytest.approx(good["fid"]["value"], rel=1e-9)


def test_a_job_that_died_goes_on_where_it_was(
    reference: Path,
    extractor: ExtractorConfig,
    clip_folder: Path,
    generated: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = generated("red", "green", "blue")
    job = EvaluateConfig(
        str(folder),
        str(reference),
        fid=extractor,
        inception=extractor,
        clip=ClipModelConfig(str(clip_folder)),
        frames=4,
        splits=2,
        batch=3,
        cache=str(tmp_path / "undisturbed"),
        device="cpu",
    )
    evaluate(job)
    undisturbed = results(folder)
    assert not list((tmp_path / "undisturbed").glob("unfinished*"))

    job = replace(job, cache=str(tmp_path / "cache"))
    monkeypatch.setattr(unfinished, "EVERY_SECONDS", 0.0)
    clips = [folder / entry["file"] for entry in json.loads((folder / "samples.json").read_text())["clips"]]
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in clips]

    def fill(number: int, data: bytes) -> None:
        clips[number].write_bytes(data)
        os.utime(clips[number], ns=(before[number][1],) * 2)  # the job is told by sizes and times

    fill(7, bytes(len(before[7][0])))  # in the third batch
    with pytest.raises(UserError, match=clips[7].name):
        evaluate(job)
    (kept,) = (tmp_path / "cache").glob("unfinished*")
    fill(7, before[7][0])
    for number in range(6):
        fill(number, bytes(len(before[number][0])))  # were they read again, the job would end
    evaluate(replace(job, batch=4))
    assert not kept.exists()
    for name, entry in results(folder).items():
        assert entry["value"] == pytest.approx(undisturbed[name]["value"], rel=1e-9), name
        assert entry["samples"] == undisturbed[name]["samples"]
    with pytest.raises(UserError, match=clips[0].name):  # nothing is left of it
        evaluate(job)


def test_sums_over_real_clips_go_on_where_they_were(
    reference: Path, extractor: ExtractorConfig, generated: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = generated("red", "green", "blue")
    job = EvaluateConfig(str(folder), str(reference), fid=extractor, frames=4, batch=5, cache=str(tmp_path / "a"), device="cpu")
    evaluate(job)
    undisturbed = results(folder)["fid"]
    monkeypatch.setattr(unfinished, "EVERY_SECONDS", 0.0)
    read, numbers = RealClips.read, list[int]()

    def failing(self: RealClips, number: int) -> Sample:
        numbers.append(number)
        if number == 8 and numbers.count(8) == 1:
            raise KeyboardInterrupt
        return read(self, number)

    monkeypatch.setattr(RealClips, "read", failing)
    job = replace(job, cache=str(tmp_path / "b"))
    with pytest.raises(KeyboardInterrupt):
        evaluate(job)
    evaluate(job)
    assert numbers == [*range(9), *range(5, 12)]
    assert results(folder)["fid"] == undisturbed


def test_two_processes_measure_what_one_does(
    reference: Path, extractor: ExtractorConfig, clip_folder: Path, generated: Callable[..., Path], tmp_path: Path
) -> None:
    folder = generated("red", "green", "blue")
    job = EvaluateConfig(
        str(folder),
        str(reference),
        fid=extractor,
        clip_fid=replace(extractor, size=(8, 8)),
        inception=extractor,
        clip=ClipModelConfig(str(clip_folder)),
        frames=4,
        splits=2,
        batch=4,
        limit=11,  # an odd number: the second process has one clip less
        cache=str(tmp_path / "cache"),
        device="cpu",
    )
    evaluate(job)
    one = results(folder)
    (tmp_path / "job.yaml").write_text(config.to_yaml(job))
    launcher = str(Path(sys.executable).with_name("composer"))
    for cache in ("elsewhere", "elsewhere", "cache"):  # the real clips' sums made together, then taken up
        (folder / "evaluation.json").unlink()
        overrides = [str(tmp_path / "job.yaml"), f"cache={tmp_path}/{cache}"]
        subprocess.run([launcher, "-n", "2", "pipelines/evaluate.py", *overrides], cwd=ROOT, check=True, timeout=300)
        two = results(folder)
        assert list(two) == ["fid", "clip_fid", "inception_score", "clipsim"]
        for name, entry in one.items():
            assert two[name]["value"] == pytest.approx(entry["value"], rel=1e-4, abs=1e-6), name
            assert (two[name]["samples"], two[name]["reference_samples"]) == (entry["samples"], entry["reference_samples"])


def test_squares_are_cut_from_the_middle(
    reference: Path, extractor: ExtractorConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Clips whose left and right edges are wrong, but not the square in the middle."""
    folder = tmp_path / "job"
    folder.mkdir()
    for number in range(12):
        frames = picture(list(COLOURS)[number % 3], number, 4).copy()
        frames[:, :, :4] = frames[:, :, -4:] = 255
        media.write_mp4(folder / f"{number}.mp4", frames, 24.0)
    records = [{"file": f"{number}.mp4", "prompt": "red", "seed": number} for number in range(12)]
    (folder / "samples.json").write_text(json.dumps({"clips": records}))
    published = (PublishedConfig("another system", fid=12.5, clipsim=0.25),)
    cache = str(tmp_path / "cache")
    job = EvaluateConfig(str(folder), str(reference), fid=extractor, frames=4, cache=cache, device="cpu", published=published)
    evaluate(job)
    whole = results(folder)["fid"]["value"]
    evaluate(replace(job, square=True))
    assert results(folder)["fid"]["value"] < 0.02 * whole
    assert len(list((tmp_path / "cache").iterdir())) == 2, "sums over squares are others"
    shown = capsys.readouterr().out
    assert "1 frame of each clip, squares in the middle, its own scaling" in shown
    assert "another system" in shown and "12.5" in shown and "0.25" not in shown  # clipsim was not measured


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz")]
    vocabulary = {token: number for number, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    seen = {**small, "image_size": 16, "patch_size": 8}
    said = {**small, "vocab_size": len(vocabulary), "max_position_embeddings": 16, "eos_token_id": len(vocabulary) - 1}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(vision_config=seen, text_config=said, projection_dim=8)).save_pretrained(folder)
    return folder


def test_clip_similarity_is_the_mean_cosine(clip_folder: Path, generated: Callable[..., Path]) -> None:
    folder = generated("red", "blue")
    evaluate(EvaluateConfig(str(folder), clip=ClipModelConfig(str(clip_folder)), frames=4, batch=3, device="cpu"))
    similarity = ClipSimilarity(str(clip_folder), None, "cpu")
    cosines = []
    for number, colour in enumerate(("red", "blue") * 4):
        frames = media.read_video(folder / f"{number}.mp4", 4).frames
        for frame in frames:
            pixels = similarity.processor([frame], return_tensors="pt")["pixel_values"]
            tokens = similarity.tokenizer([colour], return_tensors="pt")
            with torch.no_grad():
                out = similarity.model(pixel_values=pixels, **tokens)
            cosines.append(float(out.image_embeds[0] @ out.text_embeds[0]))
    assert results(folder)["clipsim"]["value"] == pytest.approx(np.mean(cosines), abs=1e-5)


def test_bad_input_is_told_in_one_line(
    reference: Path, extractor: ExtractorConfig, generated: Callable[..., Path], tmp_path: Path
) -> None:
    job = EvaluateConfig(str(generated("red")), str(reference), fid=extractor, frames=4, cache=str(tmp_path / "c"), device="cpu")
    for changes, told in [
        ({"generated": str(tmp_path / "none")}, "not the folder of a finished sampling job"),
        ({"reference": str(tmp_path / "none")}, "no such dataset folder"),
        ({"frames": 5}, r"0.mp4: 4 frames at 24 per second, but the config asks for 5 at 24"),
        ({"fid": replace(extractor, sha256="0")}, "its sha256 is"),
        ({"clip": ClipModelConfig(str(tmp_path)), "fid": None}, "clip: "),
        ({"clip": ClipModelConfig(str(tmp_path / "none")), "fid": None}, "clip: no such folder"),
        ({"inception": extractor, "fid": None, "splits": 50}, "4 samples do not split into 50"),
    ]:
        with pytest.raises(UserError, match=told) as error:
            evaluate(replace(job, **changes))  # type: ignore[arg-type]
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="at 24"):
        evaluate(replace(job, generated=str(generated("blue", frame_rate=12.0))))


def test_the_shipped_yaml_is_loaded_and_a_job_without_extractors_refused(capsys: pytest.CaptureFixture[str]) -> None:
    loaded = config.load(EvaluateConfig, ROOT / "yamls" / "evaluate.yaml")
    assert loaded.clip is not None and loaded.frames == 16
    with pytest.raises(SystemExit) as end:
        command.run(EvaluateConfig, evaluate, "", [str(ROOT / "yamls" / "evaluate.yaml"), "clip=null"])
    assert end.value.code == 2 and "name an extractor" in capsys.readouterr().err
