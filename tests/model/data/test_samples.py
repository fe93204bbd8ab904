import math
from collections import Counter

import numpy as np
import pytest
import torch
from torchvision.io import encode_jpeg

from model import text
from model.data import samples
from model.data.dataset import build_loader
from model.data.samples import View, decode_sample, derived_seed, draw_window, jpeg_size, stride_of, text_states
from model.data.schema import Manifest, TextManifest

HEIGHT, WIDTH = 6, 10
VIEW = View(frames=4, frame_rates=(24.0, 12.0), text_width=4, max_tokens=5, seed=0)


def manifest(**values) -> Manifest:
    text_manifest = TextManifest("encoder", "r1", 4, "bfloat16", 5)
    defaults = {"kind": "videos", "height": HEIGHT, "width": WIDTH, "frame_rate": 24.0, "max_frames": 10}
    return Manifest(**{**defaults, "frame_format": "raw", "num_samples": 1, "text": text_manifest, **values})


def row(frames: list[bytes], **values) -> dict:
    ends = np.cumsum([len(frame) for frame in frames]).astype(np.uint32)
    states = text.pack(torch.arange(12.0).view(3, 4))
    sizes = {"source_height": 100, "source_width": 200, "start_seconds": 0.0}
    return {"key": "k", "caption": "c", "frames": b"".join(frames), "frame_ends": ends, "text": states, **sizes, **values}


def raw_frames(count: int) -> list[bytes]:
    return [bytes([number]) * (HEIGHT * WIDTH * 3) for number in range(count)]


def jpeg(height: int, width: int, value: int = 0) -> bytes:
    return encode_jpeg(torch.full((3, height, width), value, dtype=torch.uint8), 100).numpy().tobytes()


def test_strides() -> None:
    assert [stride_of(24, rate) for rate in (24, 12, 8, 6, 4.8)] == [1, 2, 3, 4, 5]
    assert stride_of(24000 / 1001, 12000 / 1001) == 2
    assert [stride_of(24, rate) for rate in (48, 10, 23.9, 1000)] == [None] * 4


def test_every_frame_rate_and_start_is_drawn_equally_often() -> None:
    rng = np.random.default_rng(5)
    draws = [draw_window(9, [(24.0, 1), (12.0, 2), (8.0, 3)], 4, rng) for _ in range(6000)]
    rates = Counter(window.frame_rate for window in draws)
    assert set(rates) == {24.0, 12.0}  # 4 frames at 8 per second reach over 10
    for rate, starts in {24.0: 6, 12.0: 3}.items():
        assert abs(rates[rate] - 3000) < 5 * math.sqrt(6000 / 4)
        counts = Counter(window.indices[0] for window in draws if window.frame_rate == rate)
        assert set(counts) == set(range(starts))
        assert max(abs(count - rates[rate] / starts) for count in counts.values()) < 5 * math.sqrt(rates[rate] / starts)
    assert {np.diff(window.indices).tolist()[0] for window in draws if window.frame_rate == 12.0} == {2}
    assert max(window.indices[-1] for window in draws) == 8


def test_a_clip_that_fits_exactly_has_one_window_and_a_shorter_one_none() -> None:
    rng = np.random.default_rng(0)
    assert draw_window(7, [(12.0, 2)], 4, rng).indices == range(0, 7, 2)
    with pytest.raises(ValueError, match="the clip has 6 frames, but 4 at the configured frame rates need 7 or more"):
        draw_window(6, [(12.0, 2)], 4, rng)


def test_derived_seeds_are_fixed_distinct_and_fit_int64() -> None:
    seeds = {derived_seed(*parts) for parts in np.ndindex(5, 6, 7)}
    assert len(seeds) == 5 * 6 * 7
    assert derived_seed(1, 2, 3) == derived_seed(1, 2, 3)
    assert min(seeds) >= 0 and max(seeds) < 2**63


@pytest.mark.parametrize("kind", ["raw", "jpeg"])
def test_a_clip_is_decoded_at_its_window(kind: str) -> None:
    frames = raw_frames(10) if kind == "raw" else [jpeg(HEIGHT, WIDTH, value) for value in range(10)]
    windows = set()
    for seed in range(50):
        sample = decode_sample(row(frames), manifest(frame_format=kind), VIEW, seed)
        again = decode_sample(row(frames), manifest(frame_format=kind), VIEW, seed)
        assert torch.equal(sample.frames, again.frames)
        assert sample.frames.shape == (4, HEIGHT, WIDTH, 3)
        assert sample.frames.is_contiguous()
        shown = sample.frames[:, 0, 0, 0].long()
        assert (sample.frames == shown.view(4, 1, 1, 1)).all()
        assert torch.diff(shown).tolist() == [round(24 / sample.frame_rate)] * 3
        windows.add((sample.frame_rate, int(shown[0])))
    assert windows == {(24.0, start) for start in range(7)} | {(12.0, start) for start in range(4)}
    assert sample.resolution == (100, 200)
    assert torch.equal(sample.text, torch.arange(12.0).view(3, 4).bfloat16())


def test_jpeg_colours_and_orientation_survive() -> None:
    pixels = torch.zeros(3, 32, 48, dtype=torch.uint8)
    pixels[0, :16], pixels[2, :, 24:] = 200, 150  # red above, blue to the right
    image = manifest(kind="images", max_frames=1, height=32, width=48, frame_format="jpeg", frame_rate=0.0)
    sample = decode_sample(row([encode_jpeg(pixels, 95).numpy().tobytes()]), image, VIEW, 0)
    assert sample.frames.shape == (1, 32, 48, 3)
    assert sample.frame_rate == math.inf
    assert sample.is_image
    difference = sample.frames[0].permute(2, 0, 1).float() - pixels.float()
    assert difference.abs().mean() < 4


def test_jpeg_size_reads_the_header_alone() -> None:
    assert jpeg_size(jpeg(6, 10)) == (6, 10)
    assert jpeg_size(jpeg(300, 17)[:400]) == (300, 17)
    for data in (b"", b"\xff\xd8", b"\xff\xd8\xff\xe0\x00\x00" * 5, b"\x89PNG" + bytes(50), jpeg(6, 10)[:20]):
        with pytest.raises(ValueError, match="not a JPEG"):
            jpeg_size(data)


RAW, JPEG = {}, {"frame_format": "jpeg"}
BIG = bytearray(jpeg(16, 16))
BIG[BIG.index(b"\xff\xc0") + 5 : BIG.index(b"\xff\xc0") + 9] = b"\xff\xff\xff\xff"


@pytest.mark.parametrize(
    ("stored", "changed", "what"),
    [
        (raw_frames(11), RAW, "holds 1 to 10 frames"),
        (raw_frames(3), RAW, "the clip has 3 frames, but 4 at"),
        ([b"\0" * 100] * 6, RAW, "raw frames are not of 6 x 10 pixels"),
        (row(raw_frames(6), frame_ends=np.array([180, 180, 360, 540, 720, 1080], np.uint32)), RAW, "offsets do not fit"),
        (row(raw_frames(6), frame_ends=np.arange(1, 7, dtype=np.uint32) * 4_000_000), RAW, "offsets do not fit"),
        (row(raw_frames(6), frame_ends=np.ones((2, 3), np.uint32)), RAW, "frame_ends has the shape"),
        (row(raw_frames(6), text=np.zeros((6, 4), np.uint16)), RAW, "text states have the shape"),
        (row(raw_frames(6), text=np.zeros((3, 8), np.uint16)), RAW, "text states have the shape"),
        (row(raw_frames(6), text=np.zeros(4, np.uint16)), RAW, "text states have the shape"),
        ([jpeg(7, 10)] * 6, JPEG, r"is \(7, 10\), not \(6, 10\)"),
        ([bytes(BIG)] * 6, JPEG, r"is \(65535, 65535\), not \(6, 10\)"),
        ([jpeg(6, 10)[:-30]] * 6, JPEG, "truncated"),
        ([b"text"] * 6, JPEG, "not a JPEG"),
    ],
)
def test_rows_that_are_not_what_the_manifest_says_are_refused(stored, changed: dict, what: str) -> None:
    given = stored if isinstance(stored, dict) else row(stored)
    with pytest.raises((ValueError, RuntimeError), match=what):
        decode_sample(given, manifest(**changed), VIEW, 0)


@pytest.mark.parametrize(("videos", "chosen"), [(3, [0, 1, 2]), (40, [0, 1, 2, 3, 18, 19, 20, 21, 36, 37, 38, 39])])
def test_text_states_are_those_of_captions_from_all_over(
    tmp_path, write_dataset, config, monkeypatch, videos: int, chosen: list[int]
) -> None:
    monkeypatch.setattr(samples, "RUNS", 3)
    monkeypatch.setattr(samples, "RUN_LENGTH", 4)
    given = config(videos=write_dataset(tmp_path / "videos", "videos", videos), frame_rates=(24.0,))
    loader = build_loader(given, 1).dataloader
    part = loader.joint.parts["videos"]
    expected = torch.cat([part._read(number, 0).text for number in chosen]).float()
    assert torch.equal(text_states(loader.joint.parts.values()), expected)
