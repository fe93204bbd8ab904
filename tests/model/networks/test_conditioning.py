"""Conditioning tokens: what they see, and what they do not."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.networks.conditioning import Conditioning, ConditioningTokens, TextStandard, measure_text
from model.networks.layers import reset_parameters

TEXT, RATE = slice(0, 5), 6  # where the five text tokens and the frame rate's stand; sigma is 5, height 7, width 8


@pytest.fixture
def layer() -> ConditioningTokens:
    torch.manual_seed(0)
    layer = ConditioningTokens(6, 16, corruption=False)
    reset_parameters(layer)
    return layer.eval()


def readable(layer: ConditioningTokens, given: Conditioning) -> Tensor:
    """Tokens with zeros where they may not be read."""
    tokens, mask = layer(given)
    return tokens * mask[..., None]


def test_tokens_and_their_mask(layer, conditioning) -> None:
    given = conditioning(4)
    tokens, mask = layer(given)
    assert tokens.shape == (4, 5 + 4, 16)
    assert mask.sum(1).tolist() == [3 + 4, 5 + 4, 1 + 4, 4 + 4]
    assert torch.equal(mask[:, TEXT], given.text_mask)
    torch.testing.assert_close(tokens[:, TEXT], given.text @ layer.text.weight.T + layer.text.bias)


@pytest.mark.parametrize(
    ("change", "token"),
    [
        ({"c_noise": torch.tensor([0.3, 0.1, 0.2, 0.4])}, 5),
        ({"frame_rate": torch.tensor([7.0, 9.0, 11.0, math.inf])}, 6),
        ({"resolution": torch.tensor([[90.0, 64.0], [90.0, 1280.0], [90.0, 64.0], [90.0, 1280.0]])}, 7),
        ({"resolution": torch.tensor([[36.0, 90.0], [720.0, 90.0], [36.0, 90.0], [720.0, 90.0]])}, 8),
    ],
)
def test_each_scalar_moves_its_own_token(layer, conditioning, change: dict[str, Tensor], token: int) -> None:
    moved = (layer(conditioning(4))[0] - layer(conditioning(4, **change))[0]).abs().amax(2) > 1e-3
    assert moved.nonzero().tolist() == [[row, token] for row in range(4)]


def test_a_standard_takes_away_what_all_states_share() -> None:
    standard = TextStandard(3)
    reset_parameters(standard)
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(500, 3, generator=generator) * torch.tensor([0.1, 7.0, 0.0]) + torch.tensor([5.0, -3.0, 2.0])
    assert torch.equal(standard(states), states)
    standard.measure(states)
    out = standard(states)
    torch.testing.assert_close(out.mean(0), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(out.std(0), torch.tensor([1.0, 1.0, 0.0]))
    assert not any(p.requires_grad for p in standard.parameters())
    for wrong in (torch.randn(1, 3), torch.randn(9, 4), torch.randn(2, 5, 3)):
        with pytest.raises(ValueError, match=r"states must be \(N, 3\) with N of at least 2"):
            standard.measure(wrong)


@pytest.mark.parametrize("broken", [3e38, float("inf"), float("nan")])
def test_one_broken_caption_does_not_decide_what_is_usual(broken: float) -> None:
    standard, other = TextStandard(3), TextStandard(3)
    states = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    standard.measure(states)
    other.measure(torch.cat([states[:20], torch.full((2, 3), broken), states[20:]]))
    assert torch.equal(other.mean, standard.mean) and torch.equal(other.spread, standard.spread)
    with pytest.raises(ValueError, match=r"N of at least 2, got \(1, 3\)"):
        other.measure(torch.cat([states[:1], torch.full((1, 3), float("nan"))]))


def test_behind_a_standard_it_does_not_matter_how_an_encoder_scales_its_states(conditioning) -> None:
    given = conditioning(4)
    outputs = []
    for scale, shift in ((1.0, 0.0), (30.0, 200.0)):
        torch.manual_seed(0)
        layer = ConditioningTokens(6, 16, corruption=False, standardised=True)
        reset_parameters(layer)
        text = given.text * scale + shift
        measure_text(layer, lambda text=text: text[given.text_mask])
        outputs.append(readable(layer, replace(given, text=text)))
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-4)


def test_nobody_reads_captions_for_a_network_without_a_standard(layer) -> None:
    measure_text(layer, lambda: pytest.fail("asked for the states"))


def test_an_image_has_its_own_value(layer, conditioning) -> None:
    given = conditioning(4)  # row 1 is an image
    before = layer(given)[0]
    torch.testing.assert_close(before[1, RATE], layer.image)
    with torch.no_grad():
        layer.image.add_(1)
    changed = (layer(given)[0] != before).any(2)
    assert changed.nonzero().tolist() == [[1, RATE]]
    with torch.no_grad():
        layer.frame_rate.output.bias.add_(1)
    assert (layer(given)[0] != before).any(2).nonzero().tolist() == [[row, RATE] for row in range(4)]
    torch.testing.assert_close(layer(given)[0][1, RATE], layer.image)  # untouched by the rates' embedding


def test_infinite_rates_leave_gradients_finite(layer, conditioning) -> None:
    layer(conditioning(4))[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters() if p is not layer.null_text)


def test_dropped_text_is_the_learned_null_whatever_the_text(layer, conditioning) -> None:
    given = conditioning(4)
    dropped = given.without_text()
    tokens, mask = layer(dropped)
    assert mask[:, TEXT].tolist() == [[True, False, False, False, False]] * 4
    torch.testing.assert_close(tokens[:, 0], layer.null_text.expand(4, -1))
    other = replace(dropped, text=100 * torch.randn(4, 5, 6))
    assert torch.equal(readable(layer, other), readable(layer, dropped))


def test_text_is_dropped_by_sample(layer, conditioning) -> None:
    given = conditioning(4)
    mixed = given.without_text(torch.tensor([False, True, False, True]))
    kept, dropped = readable(layer, given), readable(layer, given.without_text())
    expected = torch.stack([kept[0], dropped[1], kept[2], dropped[3]])
    assert torch.equal(readable(layer, mixed), expected)
    assert given.text_mask.any(1).all()  # the original is as it was


def test_an_upsampler_is_told_its_inputs_corruption(conditioning) -> None:
    layer = ConditioningTokens(6, 16, corruption=True)
    reset_parameters(layer)
    with pytest.raises(ValueError, match="^corruption: "):
        layer(conditioning(4))
    tokens, mask = layer(conditioning(4, corruption=torch.zeros(4)))
    assert tokens.shape == (4, 5 + 5, 16)
    assert mask[:, -1].all()
    moved = (layer(conditioning(4, corruption=torch.full((4,), 0.3)))[0] != tokens).any(2)
    assert moved.nonzero().tolist() == [[row, 9] for row in range(4)]


def test_every_parameter_is_initialised() -> None:
    layer = ConditioningTokens(6, 16, corruption=True)
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(math.nan)
    reset_parameters(layer)
    assert all(p.isfinite().all() for p in layer.parameters())
