"""Captions by models: what they say is of the picture, and how bad models are told."""

import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from describers import COLOURS, QUESTION, build_blip, build_llava, picture, scene
from PIL import Image
from streaming import LocalDataset
from transformers import AutoModelForImageTextToText

from dataprep import run
from dataprep.captioner import Captioner, CaptionerConfig
from model import text
from model.config import load
from model.errors import UserError
from model.text import TextEncoder


@pytest.fixture(scope="session")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_blip(tmp_path_factory.mktemp("models") / "small-blip")


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_llava(tmp_path_factory.mktemp("models") / "small-llava")


def test_a_describing_model_says_what_each_picture_shows(blip: Path) -> None:
    captioner = Captioner(CaptionerConfig(str(blip), batch=2))
    names = [*COLOURS, *reversed(COLOURS)]
    assert captioner.describe([[picture(name)] for name in names]) == [f"a {name} picture" for name in names]
    assert captioner.describe([]) == []


def test_a_prompt_is_gone_on_from(blip: Path) -> None:
    assert Captioner(CaptionerConfig(str(blip), prompt="a")).describe([[picture("blue")]]) == ["a blue picture"]


def test_a_chat_model_sees_all_pictures_in_their_order_and_only_its_answer_counts(llava: Path) -> None:
    captioner = Captioner(CaptionerConfig(str(llava), prompt=QUESTION, frames=2))
    pairs = [("red", "blue"), ("blue", "red"), ("green", "green")]
    assert captioner.describe([[picture(name) for name in pair] for pair in pairs]) == [f"{a} then {b}" for a, b in pairs]


def test_words_are_cut_where_configured(blip: Path) -> None:
    assert Captioner(CaptionerConfig(str(blip), max_new_tokens=2)).describe([[picture("red")]]) == ["a red"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no"), "captioner"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "t5"}'), "captioner"),
        (lambda folder: (folder / "config.json").unlink(), "captioner"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "captioner"),
    ],
)
def test_a_folder_that_holds_no_captioner_is_one_line(change, message: str, blip: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = shutil.copytree(blip, tmp_path / "broken")
    change(folder)
    with pytest.raises(UserError, match=message) as caught:
        Captioner(CaptionerConfig(str(folder)))
    assert "\n" not in str(caught.value)


def test_weights_as_pickle_are_not_read(blip: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(blip, tmp_path / "pickled")
    weights = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(UserError):
        Captioner(CaptionerConfig(str(folder)))


def test_what_a_model_cannot_be_asked_is_told(blip: Path, llava: Path) -> None:
    with pytest.raises(UserError, match=r"captioner\.frames.*no chat template"):
        Captioner(CaptionerConfig(str(blip), frames=2))
    with pytest.raises(UserError, match=r"captioner\.prompt"):
        Captioner(CaptionerConfig(str(llava)))
    with pytest.raises(ValueError, match="batch must be at least 1"):
        CaptionerConfig("x", batch=0)


YAML = """\
inputs: [{folder}/in]
output: {folder}/out
stages:
  - {{ name: small, height: 18, width: 32, frame_format: raw }}
  - {{ name: large, height: 288, width: 512, frame_format: jpeg }}
clips: {{ frame_rate: 24, clip_frames: 24, min_frames: 12 }}
select: {{ duplicate_bits: null, max_letterbox: 1, min_motion: 0, min_sharpness: 0, max_text_area: 0.05 }}
text: {{ path: {encoder}, max_tokens: 12 }}
captioner: {{ path: {captioner} }}
looks: {{ text_area: true }}
spark: {{ master: "local[2,3]" }}
"""


def test_a_job_describes_what_has_no_caption_and_says_who_wrote_it(
    blip: Path, media: Any, encoder_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = tmp_path / "in"
    inputs.mkdir()
    shots = [picture("red", 288, 512)] * 24 + [picture("blue", 288, 512)] * 24
    media.video(inputs / "shots.mp4", shots, 24)
    Image.fromarray(picture("green", 288, 512)).save(inputs / "still.png")
    (inputs / "empty.txt").write_text(" ")
    Image.fromarray(picture("blue", 288, 512)).save(inputs / "empty.png")
    Image.fromarray(picture("red", 288, 512)).save(inputs / "given.png")
    (inputs / "given.txt").write_text("my own words")
    Image.fromarray(scene("SALE -50% today only", 44)[0]).save(inputs / "advert.png")
    (inputs / "advert.txt").write_text("an advertisement")
    Image.fromarray(picture("red", 288, 512)).save(inputs / "latin.png")
    (inputs / "latin.txt").write_bytes(b"caf\xe9")  # which is not the same as none
    yaml = tmp_path / "job.yaml"
    yaml.write_text(YAML.format(folder=tmp_path, encoder=encoder_folder, captioner=blip))
    run.run(load(run.DataprepConfig, yaml))

    clips = {row["key"]: row for row in pq.read_table(tmp_path / "out/clips.parquet").to_pylist()}
    said = {key: (row["caption"], row["captioner"], row["fate"], row["reason"]) for key, row in clips.items()}
    assert said == {
        "shots:0": ("a red picture", "small-blip", "kept", ""),
        "shots:1": ("a blue picture", "small-blip", "kept", ""),
        "still:0": ("a green picture", "small-blip", "kept", ""),
        "empty:0": ("a blue picture", "small-blip", "kept", ""),
        "given:0": ("my own words", "", "kept", ""),
        "advert:0": ("an advertisement", "", "filtered", "text"),
    }
    assert clips["advert:0"]["text_area"] > 0.05
    assert clips["still:0"]["text_area"] == 0
    assert clips["still:0"]["aesthetic"] is None
    encoder = TextEncoder(str(encoder_folder), 12)
    for kind, count in (("videos", 2), ("images", 3)):
        rows = LocalDataset(str(tmp_path / "out/large" / kind))
        assert len(rows) == count
        for row in rows:
            assert row["caption"] == clips[row["key"]]["caption"]
            torch.testing.assert_close(text.unpack(row["text"]), encoder.encode([row["caption"]])[0])
    rejects = pq.read_table(tmp_path / "out/rejects.parquet").to_pylist()
    assert {row["key"]: row["reason"] for row in rejects if row["fate"] == "rejected"} == {"latin": "caption is not UTF-8"}

    capsys.readouterr()
    run.run(load(run.DataprepConfig, yaml))
    assert "nothing to do" in capsys.readouterr().out
    for override, message in (
        ("captioner=null", "another config"),
        ("captioner.path=/nowhere", "captioner.path: no such folder"),
        ("looks.text_area=false", "needs the score looks.text_area"),
    ):
        with pytest.raises(UserError, match=message):
            run.run(load(run.DataprepConfig, yaml, [override]))
