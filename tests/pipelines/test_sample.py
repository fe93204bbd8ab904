"""Sampling through the cascade, from published folders with a real small T5."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from model import checkpoint, command, config, media
from model.codec import PixelCodecConfig
from model.errors import RunError, UserError
from pipelines.cascade import Cascade, CascadeConfig
from pipelines.sample import GivenConfig, SampleConfig, read_given, sample, slug

PROMPTS = ("a red circle moves left", "a blue square")


def test_a_clip_depends_on_its_prompt_and_seed_alone(cascade_config: CascadeConfig) -> None:
    cascade = Cascade(cascade_config, "cpu")
    both = cascade.sample(PROMPTS, [3, 4])
    assert both.low.shape == (2, 4, 6, 16, 3) and both.high.shape == (2, 4, 12, 32, 3)
    alone = cascade.sample(PROMPTS[1:], [4])
    # Batched matrix products may round otherwise; one level of 255 at most.
    assert (alone.high[0].int() - both.high[1].int()).abs().max() <= 1
    assert not torch.equal(cascade.sample(PROMPTS[1:], [5]).high, alone.high)
    assert not torch.equal(cascade.sample(PROMPTS[:1], [4]).high, alone.high)


def test_a_job_writes_clips_sheet_and_settings(cascade_config: CascadeConfig, tmp_path: Path) -> None:
    sample(SampleConfig(PROMPTS, str(tmp_path / "out"), cascade_config, seed=3, batch=1, device="cpu"))
    described = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert [(clip["prompt"], clip["seed"]) for clip in described["clips"]] == [(PROMPTS[0], 3), (PROMPTS[1], 4)]
    assert described["models"]["stage2"] == {"run": "run", "step": 1, "commit": "commit"}
    for clip in described["clips"]:
        video = media.read_video(tmp_path / "out" / clip["file"], 100)
        assert video.frames.shape == (4, 12, 32, 3) and video.frame_rate == 8.0
        assert (tmp_path / "out" / clip["file"]).with_suffix(".gif").is_file()
    assert (tmp_path / "out" / "sheet.png").is_file()


def frames_of(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: media.read_video(path, 100).frames for path in sorted(folder.glob("*.mp4"))}


def test_a_job_makes_what_is_missing_and_says_in_each_file_where_it_comes_from(
    cascade_config: CascadeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = SampleConfig((*PROMPTS, "a green star"), str(tmp_path), cascade_config, batch=2, device="cpu")
    sample(job)
    first = {path.name: path.read_bytes() for path in tmp_path.glob("*.mp4")}
    tags = media.read_tags(tmp_path / "001-a-blue-square.mp4")
    told = json.loads(tags["comment"])
    assert (tags["title"], told["prompt"], told["seed"]) == ("a blue square", "a blue square", 1)
    assert told["models"]["stage1"]["run"] == "run" and told["settings"]["stage1_sampler"]["guidance"] == 2

    (tmp_path / "001-a-blue-square.mp4").unlink()
    (tmp_path / "002-a-green-star.mp4").write_bytes(first["002-a-green-star.mp4"][:500])  # cut short
    kept = (tmp_path / "000-a-red-circle-moves-left.mp4").stat().st_mtime_ns
    sample(job)
    assert "1 of 3 clips are there already" in capsys.readouterr().out
    assert (tmp_path / "000-a-red-circle-moves-left.mp4").stat().st_mtime_ns == kept
    again = {path.name: path.read_bytes() for path in tmp_path.glob("*.mp4")}
    assert again["001-a-blue-square.mp4"] == first["001-a-blue-square.mp4"], "alone in its batch, it is the same"
    assert again.keys() == first.keys()
    sample(replace(job, seed=1))
    assert (tmp_path / "000-a-red-circle-moves-left.mp4").stat().st_mtime_ns != kept, "of another seed"


def test_a_disk_that_is_full_is_told_in_one_line(cascade_config: CascadeConfig, tmp_path: Path) -> None:
    (tmp_path / "000-a-red-circle-moves-left.mp4").mkdir()  # cannot be replaced by a file
    with pytest.raises(RunError, match=r"000-a-red-circle-moves-left.mp4: .*the clips before it are whole"):
        sample(SampleConfig(PROMPTS, str(tmp_path), cascade_config, device="cpu"))


@pytest.mark.slow
def test_two_processes_make_what_one_does(cascade_config: CascadeConfig, tmp_path: Path) -> None:
    yaml = tmp_path / "job.yaml"
    (tmp_path / "prompts.txt").write_text("a green star\na white dot\n")
    job = {
        "prompts": list(PROMPTS),
        "prompts_file": str(tmp_path / "prompts.txt"),
        "batch": 3,
        "device": "cpu",
        "cascade": config.to_tree(cascade_config),
    }
    yaml.write_text(json.dumps(job))
    launcher = str(Path(sys.executable).with_name("composer"))
    root = Path(__file__).parents[2]
    shared = [launcher, "-n", "2", "pipelines/sample.py", str(yaml), f"output={tmp_path}/two"]
    subprocess.run(shared, cwd=root, check=True, timeout=300)
    command.run(SampleConfig, sample, "", [str(yaml), f"output={tmp_path}/one"])
    one, two = frames_of(tmp_path / "one"), frames_of(tmp_path / "two")
    assert len(one) == 4 and one.keys() == two.keys()
    for name, frames in one.items():
        assert np.abs(frames.astype(int) - two[name]).max() <= 3, name  # batches of other sizes may round otherwise
    assert (tmp_path / "two" / "sheet.png").is_file()


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smooth picture of another size and shape than the clips."""
    y, x = np.mgrid[0:90, 0:160]
    path = tmp_path_factory.mktemp("given") / "picture.png"
    Image.fromarray(np.stack([x * 1.5, y * 2.5, 255 - x], axis=-1).astype(np.uint8)).save(path)
    return path


def test_longer_clips_from_a_given_picture(cascade_config: CascadeConfig, picture: Path, tmp_path: Path) -> None:
    longer = replace(cascade_config, frames=9, hierarchy=(4.0,))
    given = (GivenConfig(str(picture)), GivenConfig(str(picture), at=-1))
    sample(SampleConfig(PROMPTS[:1], str(tmp_path), longer, given=given, device="cpu"))
    (frames,) = frames_of(tmp_path).values()
    assert frames.shape == (9, 12, 32, 3)
    shown = Image.open(picture).resize((32, 18), Image.Resampling.BICUBIC).crop((0, 3, 32, 15))
    for frame in (frames[0], frames[-1]):
        assert np.abs(frame.astype(int) - np.asarray(shown)).mean() < 8  # through h264 with its coarser colours
    assert np.abs(frames[4].astype(int) - frames[0]).mean() > 8
    # A video to continue: its frames are the clip's first ones.
    (video,) = tmp_path.glob("*.mp4")
    told = read_given((GivenConfig(str(video)),), 12)
    assert sorted(told) == list(range(9))
    alone = Cascade(replace(longer, stage2=None, frames=12), "cpu").sample(PROMPTS[:1], [0], given=told)
    assert alone.low.shape == (1, 12, 6, 16, 3)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("nowhere.png", 0), "no such file"),
        ((__file__, 0), "not a readable video"),
        (("PICTURE", 4), "given frame 4 lies outside of a clip of 4 frames"),
    ],
)
def test_bad_given_pictures(cascade_config: CascadeConfig, picture: Path, tmp_path: Path, given: Any, told: str) -> None:
    path = str(picture) if given[0] == "PICTURE" else given[0]
    with pytest.raises(UserError, match=told):
        sample(SampleConfig(PROMPTS[:1], str(tmp_path), cascade_config, given=(GivenConfig(path, given[1]),), device="cpu"))


@pytest.mark.parametrize("hierarchy", [(3.0,), (8.0,), (4.0, 2.0), (0.0,)])
def test_rates_that_do_not_divide_are_refused(cascade_config: CascadeConfig, hierarchy: tuple[float, ...]) -> None:
    with pytest.raises((ValueError, ZeroDivisionError), match="hierarchy"):
        replace(cascade_config, hierarchy=hierarchy)


def test_a_prompt_that_is_too_long_is_not_cut(cascade_config: CascadeConfig) -> None:
    with pytest.raises(UserError, match=r"^prompt 'red red .*'\.\.\. has \d+ tokens, the models take 16$"):
        Cascade(cascade_config, "cpu").sample(["red " * 40], [0])


def test_blocked_prompts_are_left_out_and_told(
    cascade_config: CascadeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocking = replace(cascade_config, blocked=("gun",))
    c = SampleConfig(("a cat", "a gun", "a dog"), str(tmp_path), blocking, device="cpu")
    sample(c)
    listed = json.loads((tmp_path / "samples.json").read_text())
    assert [(clip["prompt"], clip["seed"]) for clip in listed["clips"]] == [("a cat", 0), ("a dog", 2)]
    assert listed["refused"] == ["a gun"] and "blocked" not in listed["settings"]
    assert "1 prompts hold something" in capsys.readouterr().out
    with pytest.raises(UserError, match="all of them hold something of cascade.blocked"):
        sample(replace(c, prompts=("a gun",)))
    with pytest.raises(UserError, match="'my gun' is not served: it holds 'gun'"):
        Cascade(blocking, "cpu").sample(["my gun"], [0])


def test_stages_that_do_not_belong_together_are_refused(
    cascade_config: CascadeConfig, tmp_path: Path, write_stage: Callable[..., Path]
) -> None:
    c = cascade_config
    with pytest.raises(UserError, match="is an upsampler"):
        Cascade(replace(c, stage1=str(c.stage2)), "cpu")
    with pytest.raises(UserError, match="is no upsampler"):
        Cascade(replace(c, stage2=c.stage1), "cpu")
    manifest = checkpoint.load(Path(c.stage1)).manifests["videos"]
    model = checkpoint.load(Path(c.stage1)).denoiser.config
    taller = replace(model, codec=PixelCodecConfig(height=8, width=16, pad_bottom=0))
    with pytest.raises(UserError, match=r"makes \(4, 8, 16\).*upsamples \(4, 6, 16\)"):
        Cascade(replace(c, stage1=str(write_stage(tmp_path / "taller", taller, manifest))), "cpu")
    other = replace(manifest, text=replace(manifest.text, revision="other"))
    stranger = write_stage(tmp_path / "stranger", model, other)
    with pytest.raises(UserError, match="different text encoders"):
        Cascade(replace(c, stage1=str(stranger)), "cpu")
    with pytest.raises(UserError, match="was trained with other"):
        Cascade(replace(c, stage1=str(stranger), stage2=None), "cpu")
    with pytest.raises(UserError, match="no such folder"):
        Cascade(replace(c, text_encoder="/nowhere"), "cpu")


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["prompts=[]"], "prompts: give at least one"),
        (["prompts=[a]", "cascade.stage1=models:/none@best"], "models:/none@best"),
        (["prompts=[a]", "given=[{path: nowhere.png}]"], "given: no such file: nowhere.png"),
        (["prompts_file=nowhere.txt"], "nowhere.txt"),
        (["prompts_from=nowhere"], "nowhere"),
        (["prompts=[a]", "number=0"], "number must be at least 1, got 0"),
        (["prompts=[a]", "cascade.hierarchy=[7]"], "hierarchy [7.0] must rise"),
        (["prompts=[a]", "cascade.stage1_sampler.steps=0"], "steps must be at least 1"),
    ],
)
def test_bad_input_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], told: str
) -> None:
    yaml = str(Path(__file__).parents[2] / "yamls" / "sample.yaml")
    store = f"cascade.tracking_uri=sqlite:///{tmp_path}/none.db"
    with pytest.raises(SystemExit) as end:
        command.run(SampleConfig, sample, "", [yaml, f"output={tmp_path}/out", store, *overrides])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert told in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_file_names_hold_nothing_of_a_hostile_prompt() -> None:
    assert slug("../../etc/passwd; rm -rf /") == "etc-passwd-rm-rf"
    assert slug("…") == "clip"
