"""Pixels to model space and back."""

import numpy as np
import pytest
import torch

from model.codec import PixelCodec, PixelCodecConfig, from_pixels, to_pixels

CODEC = PixelCodec(PixelCodecConfig(height=6, width=12, pad_bottom=2, pad_right=3))


def test_padding_is_zeros_at_the_bottom_and_right() -> None:
    video = torch.rand(2, 4, 3, 6, 12) + 0.1
    encoded = CODEC.encode(video)
    assert encoded.shape == (2, 4, 3, 8, 15)
    assert torch.equal(encoded[..., :6, :12], video)
    assert not encoded[..., 6:, :].any()
    assert not encoded[..., :, 12:].any()
    mask = CODEC.mask(video.device)
    assert mask.shape == (1, 1, 1, 8, 15)
    assert torch.equal(mask.bool().expand_as(encoded), encoded > 0)
    assert torch.equal(CODEC.decode(encoded), video.clamp(max=1))


def test_decoding_clips_to_the_range_of_media() -> None:
    video = torch.linspace(-3, 3, 8 * 15).reshape(1, 1, 1, 8, 15)
    assert torch.equal(CODEC.decode(video), video[..., :6, :12].clamp(-1, 1))


def test_the_paper_pads_36_rows_to_40() -> None:
    assert PixelCodec(PixelCodecConfig()).encode(torch.zeros(1, 16, 3, 36, 64)).shape == (1, 16, 3, 40, 64)


def test_media_of_another_size_are_named() -> None:
    with pytest.raises(ValueError, match=r"^video: height and width are \(6, 11\), the codec is configured for \(6, 12\)"):
        CODEC.encode(torch.zeros(2, 4, 3, 6, 11))
    for changes, message in [({"height": 0}, "height must be at least 1"), ({"pad_right": -1}, "pad_right must not be negative")]:
        with pytest.raises(ValueError, match=message):
            PixelCodecConfig(**changes)


def test_every_byte_survives_the_round_trip() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 8, 8, 4).repeat(1, 1, 1, 3)[..., :3].contiguous()
    pixels = torch.cat([pixels, 255 - pixels], dim=1)
    video = from_pixels(pixels)
    assert video.shape == (1, 3, 16, 8)
    assert (video.min(), video.max()) == (-1, 1)
    assert torch.equal(to_pixels(video), pixels)


def test_pixels_are_rounded_to_the_nearest_and_clipped() -> None:
    levels = torch.tensor([-7.0, -1.0, -0.999, 0.001, 0.5, 1.0, 1.2]).reshape(1, 1, 7).repeat(3, 1, 1)
    expected = np.round((np.clip(levels.numpy(), -1, 1) + 1) * 127.5).astype(np.uint8)
    np.testing.assert_array_equal(to_pixels(levels).numpy(), expected.transpose(1, 2, 0))
