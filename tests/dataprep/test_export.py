"""WebDataset's own reader finds in the tars what the data set holds, whatever its keys are."""

import json
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from dataprep import encode, export, shards
from dataprep.encode import StageConfig
from model.data.schema import FrameFormat, Manifest, TextManifest

KEYS = ["plain:0", "../../etc/passwd:0", "a.b/c.d:1", "ключ:0", "x" * 300, 'quote"; rm -rf ~:0', "case", "CASE", "/", " ", "%s%d"]
CAPTION = "a <b>caption</b> of \U0001f600 {key}"


def frames_of(number: int, count: int) -> np.ndarray:
    rng = np.random.default_rng(number)
    return np.repeat(rng.integers(0, 256, (count, 4, 8, 3), dtype=np.uint8), 4, axis=1).repeat(4, axis=2)  # (T, 16, 32, 3)


def make(folder: Path, frame_format: FrameFormat, count: int = 3) -> list[encode.Packed]:
    """A data set with a sample for each of ``KEYS``."""
    stage = StageConfig("s", 16, 32, frame_format)
    part = folder / "part-00000"
    writer = shards.mds_writer(part, shards.ShardConfig())
    packed = []
    for number, key in enumerate(KEYS):
        packed.append(encode.pack([encode.encode_frame(image, stage) for image in frames_of(number, count)]))
        row: dict[str, Any] = {
            "key": key,
            "caption": CAPTION.format(key=key),
            "frames": packed[-1].frames,
            "frame_ends": packed[-1].frame_ends,
            "start_seconds": number / 2,
            "source_height": 100,
            "source_width": 200,
            "text": np.zeros((2, 4), np.uint16),
        }
        writer.write(row)
    index = {"version": 2, "shards": shards.finish_series(writer, part)}
    (folder / "index.json").write_text(json.dumps(index))
    text = TextManifest("t5", "abc", 4, "bfloat16", 8)
    Manifest("videos", 16, 32, 24.0, 8, frame_format, len(KEYS), text).write(folder)
    return packed


def read(folder: Path) -> list[dict[str, Any]]:
    urls = sorted(str(path) for path in folder.glob("*.tar"))
    return list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode("rgb8"))


@pytest.mark.parametrize("frame_format", ["raw", "jpeg"])
def test_webdataset_reads_everything_back(tmp_path: Path, frame_format: FrameFormat) -> None:
    packed = make(tmp_path / "data", frame_format)
    assert export.export(tmp_path / "data", tmp_path / "tars", samples_per_tar=4) == len(KEYS)
    assert len(list((tmp_path / "tars").glob("shard-*.tar"))) == 3
    samples = read(tmp_path / "tars")
    assert [sample["json"]["key"] for sample in samples] == KEYS
    for number, (key, sample) in enumerate(zip(KEYS, samples, strict=True)):
        assert sample["txt"] == sample["json"]["caption"] == CAPTION.format(key=key)
        facts = sample["json"]
        assert (facts["frames"], facts["frame_rate"], facts["start_seconds"]) == (3, 24.0, number / 2)
        assert (facts["height"], facts["width"], facts["source_height"], facts["source_width"]) == (16, 32, 100, 200)
        expected = frames_of(number, 3)
        if frame_format == "raw":
            assert (sample["npy"] == expected).all()
        else:
            pictures = np.stack([sample[f"{n:03d}.jpg"] for n in range(3)])
            assert pictures.shape == expected.shape
            assert np.abs(pictures.astype(int) - expected).mean() < 16  # colour at half resolution, on noise
    if frame_format == "jpeg":  # nothing is encoded a second time
        with tarfile.open(tmp_path / "tars" / "shard-00000.tar") as tar:
            stored = [tar.extractfile(name).read() for name in tar.getnames() if name.endswith(".jpg")]  # type: ignore[union-attr]
        assert b"".join(stored) == b"".join(clip.frames for clip in packed[:4])


def test_names_are_safe_and_differ(tmp_path: Path) -> None:
    make(tmp_path / "data", "jpeg", count=1)
    export.export(tmp_path / "data", tmp_path / "tars")
    with tarfile.open(tmp_path / "tars" / "shard-00000.tar") as tar:
        members = tar.getmembers()
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,90}\.(json|txt|000\.jpg)", member.name) and member.isfile() for member in members)
    names = {member.name.partition(".")[0].lower() for member in members}
    assert len(names) == len(KEYS)
    assert len({export.safe_name(0, key).lower() for key in KEYS}) == len(KEYS)


def test_the_same_data_set_gives_the_same_bytes(tmp_path: Path) -> None:
    make(tmp_path / "data", "raw")
    for name in ("a", "b"):
        export.export(tmp_path / "data", tmp_path / name)
    assert (tmp_path / "a/shard-00000.tar").read_bytes() == (tmp_path / "b/shard-00000.tar").read_bytes()


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "data", "raw")
    (tmp_path / "taken").mkdir()

    def told(dataset: str, target: str) -> str:
        with pytest.raises(SystemExit) as caught:
            export.main([str(tmp_path / dataset), "--to", str(tmp_path / target)])
        assert caught.value.code == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        return message

    assert "no such dataset folder" in told("none", "tars")
    assert "exists; choose another folder" in told("data", "taken")
    (shard,) = (tmp_path / "data").rglob("*.mds")
    damaged = bytearray(shard.read_bytes())
    damaged[-1] ^= 1
    shard.write_bytes(damaged)
    assert "do not have the xxh64" in told("data", "tars")
    assert {path.name for path in tmp_path.iterdir()} == {"data", "taken"}
