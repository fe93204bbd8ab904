"""The comparison runs whole on a few clips, and both ways yield the same ones."""

from pathlib import Path

import pytest
import torch

from bench import loader
from model.data.dataset import DataConfig, build_loader


@pytest.mark.parametrize("stage", [1, 2])
def test_ours_is_timed_against_webdataset_and_a_copy(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loader.STAGES, 2, (24, 40, "jpeg"))
    threads = torch.get_num_threads()
    try:
        result = loader.compare(stage, clips=8, size=4, rounds=1)
    finally:
        torch.set_num_threads(threads)
    rates = result["clips_per_second"]
    assert min(rates.values()) > 0 and result["ratio"] == rates["ours"] / rates["webdataset"]
    assert f"{result['ratio']:.2f} x as fast as webdataset" in loader.report(result)


def test_both_read_the_same_clips(tmp_path: Path) -> None:
    manifest = loader.write(tmp_path, 1, 8)
    config = DataConfig(
        36, 64, loader.WIDTH, loader.MAX_TOKENS, videos=str(tmp_path / "mds"), frame_rates=loader.RATES, workers=0
    )
    ours = list(build_loader(config, 4).dataloader)
    theirs = list(loader.from_tar(tmp_path / "clips.tar", manifest, 4))
    assert len(ours) == len(theirs) == 2
    for packed in (*ours, *theirs):
        assert packed["videos"].shape == (4, 16, 36, 64, 3) and packed["text"].shape == (4, 128, 1024)
    states = [torch.cat([packed["text"] for packed in side]).float().sum((1, 2)).sort().values for side in (ours, theirs)]
    assert torch.equal(*states)
