"""The shared layers against implementations written out by hand."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from model.networks.layers import Attention, FeedForward, LayerNorm, ScalarEmbedding, activate, init_linear, reset_parameters

pytestmark = pytest.mark.usefixtures("device")


def ready(module: nn.Module) -> nn.Module:
    """In float64, with every parameter away from its neutral value."""
    torch.manual_seed(0)
    for p in module.parameters():
        nn.init.normal_(p, std=0.4)
    return module.double()


def norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias


def attend(layer: Attention, query: Tensor, context: Tensor, allowed: Tensor) -> Tensor:
    """Multi-head attention, one sample, head and query at a time."""
    width = layer.head_width
    inner = layer.output.in_features
    if layer.is_self_attention:
        of_query, of_key, of_value = layer.query_key_value.weight.split(inner)
    else:
        of_query, (of_key, of_value) = layer.query.weight, layer.key_value.weight.split(inner)
    rows = []
    for sample in range(len(query)):
        q = query[sample] @ of_query.T
        k = context[sample] @ of_key.T
        v = context[sample] @ of_value.T
        heads = []
        for start in range(0, inner, width):
            part = slice(start, start + width)
            scores = q[:, part] @ k[:, part].T / math.sqrt(width)
            weights = scores.exp() * allowed[sample]
            heads.append(weights / weights.sum(-1, keepdim=True) @ v[:, part])
        rows.append(torch.cat(heads, dim=1) @ layer.output.weight.T)
    return torch.stack(rows)


@pytest.mark.parametrize(("query_width", "context_width", "inner"), [(12, 8, 8), (8, 12, 8), (8, 8, 8)])
def test_cross_attention_is_what_it_says(query_width: int, context_width: int, inner: int) -> None:
    layer = ready(Attention(query_width, context_width, 4))
    query, context = torch.randn(2, 3, query_width).double(), torch.randn(2, 5, context_width).double()
    mask = torch.tensor([[True, True, False, True, False], [True] * 5])
    assert layer.query.out_features == inner
    expected = attend(layer, norm(query, layer.query_norm), norm(context, layer.context_norm), mask)
    torch.testing.assert_close(layer(query, context, mask), expected)
    every = attend(layer, norm(query, layer.query_norm), norm(context, layer.context_norm), torch.ones_like(mask))
    torch.testing.assert_close(layer(query, context), every)


def test_self_attention_is_what_it_says() -> None:
    layer = ready(Attention(12, None, 4))
    x = torch.randn(2, 3, 12).double()
    normed = norm(x, layer.query_norm)
    torch.testing.assert_close(layer(x), attend(layer, normed, normed, torch.ones(2, 3)))
    assert [name for name, _ in layer.named_parameters() if name.endswith("bias")] == ["query_norm.bias"]


def test_feed_forward_is_what_it_says() -> None:
    layer = ready(FeedForward(6))
    x = torch.randn(2, 3, 6).double()
    hidden = norm(x, layer.norm) @ layer.expand.weight.T + layer.expand.bias
    assert hidden.shape[-1] == 24
    gelu = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    torch.testing.assert_close(layer(x), gelu @ layer.contract.weight.T + layer.contract.bias)


def test_dropout_acts_in_training_only() -> None:
    layer = ready(FeedForward(6, dropout=0.5))
    x = torch.randn(2, 3, 6).double()
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


# ln(sigma) / 4 of EDM's range, and the binary logarithms of frame rates and of resolutions: steps of about a percent.
@pytest.mark.parametrize(("first", "last"), [(-1.6, 1.1), (2.5, 6.0), (5.0, 11.0)])
def test_scalars_become_unit_variance_features_that_tell_them_apart(first: float, last: float) -> None:
    layer = ScalarEmbedding(8)
    seen: list[Tensor] = []
    layer.hidden.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    values = torch.linspace(first, last, 300)
    layer(values)
    features = seen[0]
    torch.testing.assert_close(features.pow(2).mean(1), torch.ones(300))
    distances = torch.cdist(features, features)
    distances.fill_diagonal_(math.inf)
    assert distances.min() > 0.5
    assert layer(values).shape == (300, 8)


@pytest.mark.parametrize("gain", [1.0, 0.2])
def test_linear_layers_start_at_variance_gain_squared_over_fan_in(gain: float) -> None:
    torch.manual_seed(0)
    layer = init_linear(nn.Linear(400, 300), gain)
    weight = layer.weight.detach()
    assert float(weight.std()) == pytest.approx(gain / math.sqrt(400), rel=0.02)
    assert abs(float(weight.mean())) < 1e-3
    assert layer.bias is not None
    assert not layer.bias.any()


@pytest.mark.parametrize("module", [Attention(12, 8, 4), Attention(12, None, 4), FeedForward(6), ScalarEmbedding(8)])
def test_every_parameter_is_initialised(module: nn.Module) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(math.nan)
    reset_parameters(module)
    assert all(p.isfinite().all() for p in module.parameters())


def test_parents_have_the_last_word_on_initialisation() -> None:
    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.child = nn.Linear(3, 3)

        def reset_parameters(self) -> None:
            nn.init.constant_(self.child.weight, 7)

    parent = nn.Sequential(Parent())
    reset_parameters(parent)
    assert (parent[0].child.weight == 7).all()


def test_a_head_width_that_does_not_divide_is_named() -> None:
    with pytest.raises(ValueError, match="head width 5 does not divide the attention's inner width 8"):
        Attention(12, 8, 5)


def test_layer_norm_in_bfloat16_is_that_of_float32_rounded_once(device) -> None:
    """So autocast's casts to float32 and back change nothing, and the norm does without them."""
    torch.manual_seed(0)
    layer = LayerNorm(64).bfloat16()
    for p in layer.parameters():
        nn.init.normal_(p)
    x = torch.randn(50, 64).bfloat16()
    raised = functional.layer_norm(x.float(), (64,), layer.weight.float(), layer.bias.float()).bfloat16()
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(layer(x), raised)
        assert torch.is_autocast_enabled(device.type)


def test_layer_norm_without_autocast_is_torch_s() -> None:
    x = torch.randn(5, 12)
    assert torch.equal(ready(LayerNorm(12))(x.double()), ready(nn.LayerNorm(12))(x.double()))


@pytest.mark.parametrize("name", ["gelu", "silu"])
def test_dropout_without_a_mask_has_the_gradients_of_dropout(name: str) -> None:
    activation = getattr(functional, name)
    x = torch.randn(2000, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    dropped = activate(x, name, 0.3)
    kept = dropped != 0
    assert float(kept.double().mean()) == pytest.approx(0.7, abs=0.05)
    torch.testing.assert_close(dropped, torch.where(kept, activation(x) / 0.7, 0.0))
    upstream = torch.randn_like(x)
    (found,) = torch.autograd.grad(dropped, x, upstream)
    (expected,) = torch.autograd.grad(torch.where(kept, activation(x) / 0.7, 0.0), x, upstream)
    torch.testing.assert_close(found, expected)
    assert torch.equal(activate(x, name, 0.0), activation(x))


def test_dropout_keeps_its_input_and_its_result_alone() -> None:
    """The result is what the layer behind keeps, too."""
    saved: list[Tensor] = []
    x = torch.randn(10, 16, requires_grad=True)
    weight = torch.randn(16, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        activate(x, "gelu", 0.5) @ weight
    assert {tensor.dtype for tensor in saved} == {torch.float32}  # no mask
    assert len({tensor.untyped_storage().data_ptr() for tensor in saved}) == 3  # input, result, weight
