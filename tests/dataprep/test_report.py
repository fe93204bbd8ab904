"""The page about a data set: self-contained, the same for the same seed, and harmless whatever the captions say."""

import base64
import dataclasses
import io
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dataprep import encode, report, selection, shards
from dataprep.encode import StageConfig
from dataprep.scores import Scores
from dataprep.selection import SelectConfig
from dataprep.shards import Account, ClipRow, PartWriter, ShardConfig
from model.data.schema import Kind, Manifest, TextManifest

STAGES = (StageConfig("stage1", 9, 16, "raw"), StageConfig("stage2", 36, 64, "jpeg"))
HOSTILE = [
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "</figcaption></div><iframe src=//evil.example>",
    "{{ 7 * 7 }}{% raw %}",
    "<!-- $\\frac{1}{0}$ &lt;b&gt; \u202e \U0001f600 ]]>",
]
GOOD = Scores(motion=0.1, sharpness=0.97, brightness=0.5)
DATA_URI = re.compile(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/=]+")


def manifest(kind: Kind, stage: StageConfig, samples: int, text_width: int) -> Manifest:
    text = TextManifest("t5", "abc", text_width, "bfloat16", 8)
    return Manifest(kind, stage.height, stage.width, 24.0, 6, stage.frame_format, samples, text)


def picture(level: int, stage: StageConfig) -> np.ndarray:
    return np.full((stage.height, stage.width, 3), level, np.uint8)


def add(writer: PartWriter, key: str, kind: str, caption: str, scores: Scores, level: int) -> None:
    frames = 6 if kind == "video" else 1
    aside = selection.fault(kind, scores, SelectConfig()) is not None
    values = dataclasses.asdict(scores)
    writer.clip(ClipRow(key=f"{key}:0", item=key, kind=kind, caption=caption, frames=frames, start_seconds=0.0, **values), aside)
    for stage in STAGES:
        packed = encode.pack([encode.encode_frame(picture(level + 10 * n, stage), stage) for n in range(frames)])
        row: dict[str, Any] = {
            "key": f"{key}:0",
            "caption": caption,
            "frames": packed.frames,
            "frame_ends": packed.frame_ends,
            "start_seconds": 0.0,
            "source_height": 36,
            "source_width": 64,
            "text": np.zeros((2, 4), np.uint16),
        }
        writer.write(f"{stage.name}/{kind}s", row, aside)
    writer.account(Account(key, kind, key, "kept", clips=1, seconds=0.25, frame_rate=24.0))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Hostile and plain captions, both kinds, some filtered and some rejected."""
    workspace = tmp_path / "w"
    workspace.mkdir()
    writer = PartWriter(workspace, 0, ShardConfig())
    for n, caption in enumerate([*HOSTILE, *[f"caption {n}" for n in range(30)]]):
        add(writer, f"<b>v{n}", "video", caption, GOOD, 40 + n)
        add(writer, f"i{n}", "image", caption, GOOD, 90 + n)
    for n in range(8):
        add(writer, f"s{n}", "video", f"nothing moves {n}", dataclasses.replace(GOOD, motion=0.0), 200)
    add(writer, "d", "image", "night", dataclasses.replace(GOOD, brightness=0.0), 0)
    writer.account(Account("bad", "video", "x", "rejected", "too short", "1 frame"))
    writer.commit()
    shards.gather(workspace, range(1), lambda: None)
    config = {"stages": [dataclasses.asdict(stage) for stage in STAGES], "clips": {"frame_rate": 24}}
    job = {"digest": "d", "config": config}
    select = SelectConfig(duplicate_bits=None)
    selection.select(workspace / "finished", select, STAGES, ShardConfig(), manifest, job)
    return workspace / "finished"


class Page(HTMLParser):
    """What a browser would make of it."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data.strip())


def shown(output: Path, seed: int = 0) -> Page:
    return Page(report.write(output, seed).read_text(encoding="utf-8"))


def test_hostile_captions_are_only_text(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "SHEET_CLIPS", 1000)  # all of them
    page = shown(output)
    allowed = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "div", "table", "tr", "td", "img"}
    assert {tag for tag, _ in page.elements} <= allowed | {"figure", "figcaption"}
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "href"]
        assert "src" not in attributes or DATA_URI.fullmatch(str(attributes["src"]))
    assert set(HOSTILE) <= set(page.text)
    assert "<b>v3:0" in page.text  # keys too


def test_the_page_may_load_nothing(output: Path) -> None:
    page = shown(output)
    (policy,) = [attributes["content"] for tag, attributes in page.elements if attributes.get("http-equiv")]
    assert policy is not None and policy.startswith("default-src 'none'")


def test_counts_and_reasons_are_told(output: Path) -> None:
    words = shown(output).text
    rows = [word for word in words if word]
    for name, count in (("kept", "70"), ("filtered", "9"), ("rejected", "1"), ("still", "8"), ("dark", "1"), ("too short", "1")):
        assert (name, count) in itertools.pairwise(rows), name
    assert ("stage2/videos", "35") in itertools.pairwise(rows)
    titles = [word for word in rows if re.match(r"(Kept|Filtered: \w+) \(", word)]
    assert titles == ["Kept (24 of 70)", "Filtered: dark (1 of 1)", "Filtered: still (6 of 8)"]
    assert rows.count("motion 0.00000 is less than 0.001") == 6


def test_pictures_are_those_of_the_clips(output: Path) -> None:
    page = report.write(output).read_text(encoding="utf-8")
    cells = re.findall(r'src="data:image/jpeg;base64,([^"]+)"><figcaption>.*?<div class="dim">([^<]+)</div>', page, re.DOTALL)
    assert len(cells) == 24 + 1 + 6
    for data, key in cells:
        strip = np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).astype(int)
        number = int("0" + re.sub(r"\D", "", key.removesuffix(":0").replace("&lt;", "")))
        if key.startswith("i"):
            assert strip.shape == (72, 128, 3)
            assert strip.mean() == pytest.approx(90 + number, abs=2)
        elif key.startswith("&lt;b&gt;v"):  # frames 0, 2, 3 and 5 of 6, side by side
            assert strip.shape == (72, 4 * 128 + 3 * 2, 3)
            levels = [strip[:, left + 16 : left + 112].mean() for left in range(0, 520, 130)]
            assert levels == pytest.approx([40 + number + 10 * n for n in (0, 2, 3, 5)], abs=2)


def test_the_same_seed_draws_the_same_page(output: Path) -> None:
    first = report.write(output, 1).read_bytes()
    assert report.write(output, 1).read_bytes() == first
    assert report.write(output, 2).read_bytes() != first
    assert not list(output.glob(".*"))


def test_without_a_pool_there_are_no_pictures(output: Path) -> None:
    (output / "pool").rename(output.with_name("gone"))
    page = shown(output)
    assert "No pictures: the pool is gone." in page.text
    assert sum(tag == "img" for tag, _ in page.elements) == 1


def test_a_set_of_images_alone_has_a_page(tmp_path: Path) -> None:
    workspace = tmp_path / "w"
    workspace.mkdir()
    writer = PartWriter(workspace, 0, ShardConfig())
    add(writer, "i", "image", "one", GOOD, 90)
    writer.commit()
    shards.gather(workspace, range(1), lambda: None)
    job = {"config": {"stages": [dataclasses.asdict(stage) for stage in STAGES], "clips": {"frame_rate": 24}}}
    selection.select(workspace / "finished", SelectConfig(), STAGES, ShardConfig(), manifest, job)
    assert "Kept (1 of 1)" in shown(workspace / "finished").text


def test_what_is_no_output_is_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "job.json").write_text(json.dumps({"config": {}}))
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(SystemExit) as caught:
            report.main([str(folder)])
        assert caught.value.code == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and "is not a finished output of dataprep" in told
