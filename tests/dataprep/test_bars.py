"""Black bars are cut off, whatever they lie at; what is only dark stays."""

from collections.abc import Callable
from pathlib import Path

import cv2
import nasties
import numpy as np
import pytest
from nasties import video
from PIL import Image

from dataprep import clips, partition
from dataprep.bars import Bars
from dataprep.clips import ClipConfig
from dataprep.encode import StageConfig, TextConfig
from dataprep.filters import FilterConfig
from dataprep.ingest import Item, Span
from dataprep.partition import Prepared, Recipe

HEIGHT, WIDTH, COUNT = 144, 256, 48
PICTURE = nasties.photograph(HEIGHT, WIDTH)
STAGE = StageConfig("only", 72, 128, "raw")
CLIPS = ClipConfig(frame_rate=24, clip_frames=1000, min_frames=12, split_at_cuts=False)
Scene = Callable[[int], np.ndarray]
RNG = np.random.default_rng(0)
GRAIN = RNG.normal(0, 3, (8, HEIGHT, WIDTH, 1))


def prepare(path: Path, config: ClipConfig = CLIPS) -> Prepared:
    recipe = Recipe(stages=(STAGE,), clips=config, text=TextConfig("none", 8), filters=FilterConfig())
    return partition.prepare(Item("v", "video", "v", Span(str(path))), recipe)


def shown(prepared: Prepared) -> np.ndarray:
    packed = prepared.clips[0].stages[0]
    return np.frombuffer(packed.frames, np.uint8).reshape(-1, STAGE.height, STAGE.width, 3)


def made(path: Path, scene: Scene, **options: object) -> Path:
    settings = {"crf": "20", "preset": "veryfast"}
    return video(path, [scene(n) for n in range(COUNT)], pix_fmt="yuv420p", options=settings, **options)  # type: ignore[arg-type]


def moving(n: int) -> np.ndarray:
    return np.roll(PICTURE, 2 * n, axis=1)


def barred(vertical: int, horizontal: int) -> Scene:
    def scene(n: int) -> np.ndarray:
        image = np.zeros_like(PICTURE)
        inside = slice(vertical, HEIGHT - vertical), slice(horizontal, WIDTH - horizontal)
        image[inside] = moving(n)[inside]
        return image

    return scene


def ideal(image: np.ndarray, bars: Bars) -> np.ndarray:
    """Cut, scaled to cover the stage, and cut at the centre, in floating point."""
    image = image[bars.vertical : HEIGHT - bars.vertical, bars.horizontal : WIDTH - bars.horizontal]
    scale = max(STAGE.height / image.shape[0], STAGE.width / image.shape[1])
    height, width = round(image.shape[0] * scale), round(image.shape[1] * scale)
    planes = [
        Image.fromarray(image[..., c].astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC) for c in range(3)
    ]
    top, left = (height - STAGE.height) // 2, (width - STAGE.width) // 2
    return np.stack(planes, -1)[top : top + STAGE.height, left : left + STAGE.width].clip(0, 255)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(1e-9, np.mean((a.astype(np.float64) - b) ** 2))))


@pytest.mark.parametrize("crf", ["10", "35"])
@pytest.mark.parametrize(
    ("vertical", "horizontal"), [(18, 0), (0, 32), (0, 80), (18, 32), (4, 0)], ids=["2.39", "4:3", "9:16", "both", "thin"]
)
def test_bars_are_cut_off(tmp_path: Path, vertical: int, horizontal: int, crf: str) -> None:
    scene = barred(vertical, horizontal)
    path = video(tmp_path / "v.mp4", [scene(n) for n in range(COUNT)], pix_fmt="yuv420p", options={"crf": crf})
    prepared = prepare(path)
    bars = prepared.facts.cropped
    assert vertical <= bars.vertical <= vertical + 2 * bool(vertical)
    assert horizontal <= bars.horizontal <= horizontal + 2 * bool(horizontal)
    assert prepared.facts.source == clips.Size(HEIGHT - 2 * bars.vertical, WIDTH - 2 * bars.horizontal)
    assert prepared.clips[0].scores.letterbox == 0
    near = [psnr(image, ideal(scene(n), bars)) for n, image in enumerate(shown(prepared))]
    assert len(near) == COUNT
    assert min(near) > (30 if crf == "10" else 22)
    assert min(psnr(image, ideal(scene(n), Bars())) for n, image in enumerate(shown(prepared))) < 22  # with bars it is another


def test_bars_of_a_turned_video(tmp_path: Path) -> None:
    """Letterboxed, stored on its side: there the bars are at the left and the right."""
    scene = barred(18, 0)
    frames = [np.rot90(scene(n), -1) for n in range(COUNT)]
    path = video(tmp_path / "v.mp4", frames, pix_fmt="yuv420p", options={"crf": "10"}, prepare=nasties.rotated(90))
    prepared = prepare(path)
    assert prepared.facts.source == clips.Size(HEIGHT - 36, WIDTH)
    assert min(psnr(image, ideal(scene(n), Bars(18, 0))) for n, image in enumerate(shown(prepared))) > 30


def night_sky(n: int) -> np.ndarray:
    image = moving(n)
    image[:60] = 2
    return image


def candle(n: int) -> np.ndarray:
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    glow = np.exp(-((rows - 72) ** 2 + (columns - 128 - np.sin(n)) ** 2) / 800)
    return (glow[..., None] * (250, 190, 90) + GRAIN[n % 8]).clip(0, 255).astype(np.uint8)


def ball(n: int) -> np.ndarray:
    """All it ever covers is a band with straight edges from side to side."""
    return cv2.circle(np.zeros_like(PICTURE), (5 * n, 72), 20, (200, 60, 30), -1)


def skyline(n: int) -> np.ndarray:
    """Lit houses under a black sky, over black water."""
    image = (np.full_like(PICTURE, 3) + GRAIN[n % 8]).clip(0, 255).astype(np.uint8)
    for number in range(16):
        top = 40 + 7 * (number * 5 % 6)
        image[top:100, number * 16 : number * 16 + 12] = (PICTURE[top:100, number * 16 : number * 16 + 12] * 0.6).astype(np.uint8)
    return image


def titles(n: int) -> np.ndarray:
    image = np.zeros_like(PICTURE)
    for line in range(3):
        cv2.putText(image, "DIRECTED BY", (60, 60 + 20 * line), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (230, 230, 230), 1)
    return image


def fade_in(n: int) -> np.ndarray:
    return (moving(n) * min(1, n / 36)).astype(np.uint8)


def opens(n: int) -> np.ndarray:
    """Letterboxed for more than the first second, then whole."""
    return barred(18, 0)(n) if n < 36 else moving(n)


def all_black(n: int) -> np.ndarray:
    return np.zeros_like(PICTURE)


@pytest.mark.parametrize("scene", [moving, night_sky, candle, ball, skyline, titles, fade_in, opens, all_black])
def test_what_is_dark_or_not_always_there_is_no_bar(tmp_path: Path, scene: Scene) -> None:
    prepared = prepare(made(tmp_path / "v.mp4", scene))
    assert not prepared.facts.cropped
    assert prepared.facts.source == clips.Size(HEIGHT, WIDTH)
    assert min(psnr(image, ideal(scene(n), Bars())) for n, image in enumerate(shown(prepared))) > 25


def test_bars_around_a_picture_that_fades_in(tmp_path: Path) -> None:
    """The first second is black: seen at the end only, and cut off from the first picture on."""
    whole = barred(18, 0)
    prepared = prepare(made(tmp_path / "v.mp4", lambda n: (whole(n) * min(1, max(0, n - 26) / 6)).astype(np.uint8)))
    assert prepared.facts.cropped.vertical in (18, 20)
    assert psnr(shown(prepared)[-1], ideal(whole(COUNT - 1), prepared.facts.cropped)) > 25


def test_subtitles_in_a_bar_are_not_cut_away(tmp_path: Path) -> None:
    def scene(n: int) -> np.ndarray:
        image = barred(30, 0)(n)
        return cv2.putText(image, "It was you all along.", (40, 136), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (240, 240, 240), 1)

    assert prepare(made(tmp_path / "v.mp4", scene)).facts.cropped.vertical <= 8


@pytest.mark.parametrize(("scene", "times"), [(moving, 1), (barred(18, 0), 1), (opens, 2)], ids=["none", "bars", "opens"])
def test_a_source_is_decoded_again_only_where_its_first_second_misled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scene: Scene, times: int
) -> None:
    opened, whole = [], clips._opened
    monkeypatch.setattr(clips, "_opened", lambda *arguments: opened.append(1) or whole(*arguments))
    prepare(made(tmp_path / "v.mp4", scene))
    assert len(opened) == times


def test_bars_stay_where_they_are_to_stay(tmp_path: Path) -> None:
    config = ClipConfig(frame_rate=24, clip_frames=1000, min_frames=12, split_at_cuts=False, crop_bars=False)
    prepared = prepare(made(tmp_path / "v.mp4", barred(18, 0)), config)
    assert prepared.facts.source == clips.Size(HEIGHT, WIDTH)
    assert prepared.clips[0].scores.letterbox == pytest.approx(0.25, abs=0.03)
