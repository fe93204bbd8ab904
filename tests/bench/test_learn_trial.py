"""A trial trains what the yaml says, by the yaml's optimiser, and measures it."""

import json
from pathlib import Path

import pytest
import torch

from bench import learn_trial, loader

YAML = """
base: {yamls}/learn/stage1.yaml
model:
  codec: {{ height: 8, width: 16 }}
  network: {{ size: [4, 8, 16], group: [4, 1, 1], patch_width: 32, latent_tokens: 8, latent_width: 32, blocks: 1,
    conditioning_width: 32, text_width: 1024, pixel_width: 8 }}
data: {{ videos: shards/stage1/videos, images: shards/stage1/images, frames: 4, frame_rates: [24, 12], max_tokens: 128 }}
schedule: {{ warmup: 1 }}
"""


def test_the_errors_of_two_learning_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setitem(loader.STAGES, 1, (8, 16, "raw"))
    for part in ("shards/stage1/videos", "shards/stage1/images", "held-out/shards/stage1/videos"):
        loader.write(tmp_path / part, 1, 6)
        for shard in (tmp_path / part / "mds").iterdir():
            shard.rename(tmp_path / part / shard.name)
    (tmp_path / "trial.yaml").write_text(YAML.format(yamls=learn_trial.ROOT / "yamls"))
    words = ["learn_trial.py", "--yaml", str(tmp_path / "trial.yaml"), "--folder", str(tmp_path), "--seconds", "2"]
    threads, found = torch.get_num_threads(), {}
    try:
        for rate in ("1e-12", "3e-3"):
            monkeypatch.setattr("sys.argv", [*words, "--every", "1", "--json", "global_batch=4", f"optimizer.lr={rate}"])
            learn_trial.main()
            found[rate] = json.loads(capsys.readouterr().out)
    finally:
        torch.set_num_threads(threads)
    still, learning = found["1e-12"], found["3e-3"]
    assert 1 <= learning[0]["steps"] < learning[-1]["steps"] and len(learning[0]["images"]) == len(learn_trial.NOISE)
    assert still[0]["videos"] == pytest.approx(still[-1]["videos"], rel=1e-4)
    assert all(after < 0.9 * before for after, before in zip(learning[-1]["videos"], still[-1]["videos"], strict=True))
