import math

import pytest
import torch

from model.data import batch
from model.data.batch import Sample

FRAMES, HEIGHT, WIDTH, MAX_TOKENS, TEXT_WIDTH = 3, 4, 5, 6, 2


def sample(number: int, is_image: bool) -> Sample:
    generator = torch.Generator().manual_seed(number)
    frames = torch.randint(0, 256, (1 if is_image else FRAMES, HEIGHT, WIDTH, 3), generator=generator, dtype=torch.uint8)
    text = torch.full((1 + number % MAX_TOKENS, TEXT_WIDTH), 1.0 + number, dtype=torch.bfloat16)
    rate = math.inf if is_image else 24.0
    return Sample(frames, text, rate, (10 * number, number), is_image, 1000 + number, f"key {number}", f"caption {number}")


# v i v i v i, videos alone, images alone, and an order that does not alternate
PATTERNS = [[False, True] * 3, [False] * 4, [True] * 4, [True, True, False, True, False, False]]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_model_sees_each_sample_at_its_place(pattern: list[bool]) -> None:
    samples = [sample(number, is_image) for number, is_image in enumerate(pattern)]
    seen = batch.unpack(batch.collate(samples, MAX_TOKENS), FRAMES)
    assert seen["video"].shape == (len(pattern), FRAMES, 3, HEIGHT, WIDTH)
    assert seen["video"].dtype == torch.float32
    assert seen["video"].is_contiguous()
    for row, expected in enumerate(samples):
        for frame in range(FRAMES):
            source = expected.frames[0 if expected.is_image else frame]
            torch.testing.assert_close(seen["video"][row, frame], source.permute(2, 0, 1) / 255 * 2 - 1)
        length = len(expected.text)
        assert torch.equal(seen["text"][row, :length], expected.text)
        assert seen["text"][row, length:].abs().sum() == 0
        assert seen["text_mask"][row].tolist() == [True] * length + [False] * (MAX_TOKENS - length)
        assert seen["frame_rate"][row] == expected.frame_rate
        assert seen["resolution"][row].tolist() == list(expected.resolution)
        assert seen["is_image"][row] == expected.is_image
        assert seen["seed"][row] == expected.seed
    assert seen["key"] == [expected.key for expected in samples]
    assert seen["caption"] == [expected.caption for expected in samples]
    assert seen["text"].dtype == torch.bfloat16


def test_black_and_white_are_the_ends_of_the_range() -> None:
    ends = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, HEIGHT, WIDTH, 3)
    clip = Sample(ends, torch.zeros(1, TEXT_WIDTH), 24.0, (1, 1), False, 0, "", "")
    video = batch.unpack(batch.collate([clip], MAX_TOKENS), 2)["video"]
    assert (video[0, 0] == -1).all()
    assert (video[0, 1] == 1).all()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("size", [1, 2, 4, 100])
def test_microbatches_are_the_batch_in_pieces(pattern: list[bool], size: int) -> None:
    packed = batch.collate([sample(number, is_image) for number, is_image in enumerate(pattern)], MAX_TOKENS)
    whole = batch.unpack(packed, FRAMES)
    pieces = [batch.unpack(piece, FRAMES) for piece in batch.split(packed, size)]
    assert [batch.num_samples(piece) for piece in pieces] == [
        min(size, len(pattern) - start) for start in range(0, len(pattern), size)
    ]
    for name, value in whole.items():
        parts = [piece[name] for piece in pieces]
        if isinstance(value, torch.Tensor):
            assert torch.equal(torch.cat(parts), value), name
        else:
            assert [entry for part in parts for entry in part] == value, name
