"""Starting a FIT from another: what stage 1 computes survives where it is defined."""

from dataclasses import replace

import pytest
import torch

from model.networks import catalogue
from model.networks.fit.network import FIT


def test_a_fresh_upsampler_computes_what_its_source_does(tiny, conditioning) -> None:
    """Of the same size, an upsampler started from a FIT says the same, whatever its low-resolution video holds."""
    torch.manual_seed(0)
    source, second = catalogue.build(tiny), catalogue.build(replace(tiny, upsampler=True))
    assert isinstance(second, FIT)
    adapted = second.adapt(source.state_dict(), tiny)
    assert set(adapted) == {"stem.weight"}
    second.load_state_dict({**second.state_dict(), **source.state_dict(), **adapted})
    for block in second.blocks:  # deaf to the token that only the upsampler has
        block.read_conditioning.output.weight.data.zero_()
    for block in source.blocks:
        block.read_conditioning.output.weight.data.zero_()
    video, low = torch.randn(2, 2, 4, 3, 8, 12)
    told = conditioning(2, low_resolution=low, corruption=torch.tensor([0.1, 0.4]))
    with torch.no_grad():
        torch.testing.assert_close(second(video, told).video, source(video, conditioning(2)).video)


def test_positions_that_are_sums_are_recovered(tiny) -> None:
    torch.manual_seed(0)
    factorised = replace(tiny, position="factorised")
    given = {name: weight.detach() for name, weight in catalogue.build(factorised).state_dict().items()}
    table = catalogue.build(tiny).adapt(given, factorised)
    assert set(table) == {"position.table"}
    frames = catalogue.build(factorised).adapt({**given, **table}, tiny)
    sums = (frames["position.frame"] + frames["position.place"]).flatten(0, 1)
    torch.testing.assert_close(sums, table["position.table"])


def test_positions_stretch_over_a_larger_grid(tiny) -> None:
    """A table that rises linearly along height and width still does, between the outermost patches' centres."""
    t, h, w = tiny.grid
    rise = torch.arange(h)[:, None] + 10.0 * torch.arange(w)
    table = rise.expand(t, h, w).reshape(-1, 1).expand(-1, tiny.patch_width)
    larger = replace(tiny, size=(4, 16, 24), group=(4, 4, 6))
    stretched = catalogue.build(larger).adapt({"position.table": table}, tiny)["position.table"]
    found = stretched[:, 0].reshape(t, 2 * h, 2 * w)
    torch.testing.assert_close(found[:, 1:-1, 1:-1].diff(dim=1), torch.full((t, 2 * h - 3, 2 * w - 2), 0.5))
    torch.testing.assert_close(found[:, 1:-1, 1:-1].diff(dim=2), torch.full((t, 2 * h - 2, 2 * w - 3), 5.0))
    assert stretched.shape == catalogue.build(larger).position.table.shape


def test_factorised_positions_keep_the_tables_strength(tiny) -> None:
    torch.manual_seed(0)
    given = catalogue.build(tiny).state_dict()
    parts = catalogue.build(replace(tiny, position="factorised")).adapt(given, tiny)
    sums = parts["position.frame"] + parts["position.place"]
    torch.testing.assert_close(sums.square().mean(), given["position.table"].square().mean())


@pytest.mark.parametrize(("before", "after"), [(0, 6), (6, 0), (6, 6)])
def test_a_stem_of_other_channels_is_left_alone(tiny, before: int, after: int) -> None:
    source, upsampler = replace(tiny, pixel_width=before), replace(tiny, pixel_width=after, upsampler=True)
    assert catalogue.build(upsampler).adapt(catalogue.build(source).state_dict(), source) == {}


def test_another_width_is_left_alone(tiny) -> None:
    wider = replace(tiny, patch_width=24, upsampler=True)
    assert catalogue.build(wider).adapt(catalogue.build(tiny).state_dict(), tiny) == {}
