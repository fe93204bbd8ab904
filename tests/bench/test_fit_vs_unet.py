"""The comparison runs whole on small networks, and says what it measured."""

import argparse
import json
from pathlib import Path

import pytest

from bench import fit_vs_unet

SMALL_UNET = """
base: {yamls}/unet_284m.yaml
model:
  codec: {{ height: 6, width: 16, pad_bottom: 2 }}
  network: {{ size: [4, 8, 16], base_width: 32, multipliers: [1, 2], attention_factors: [2], head_width: 32,
    conditioning_width: 64, text_width: 8, residual_blocks: 1 }}
data: {{ frames: 4 }}
"""


@pytest.fixture
def small(small_fit: Path, tmp_path: Path, monkeypatch) -> None:
    small_unet = tmp_path / "unet.yaml"
    small_unet.write_text(SMALL_UNET.format(yamls=fit_vs_unet.YAMLS))
    networks = {"FIT 500M": small_fit, "U-Net 284M": small_unet}
    monkeypatch.setattr(fit_vs_unet, "NETWORKS", networks)


def test_both_networks_are_timed_against_each_other_and_the_machine(small, capsys) -> None:
    arguments = argparse.Namespace(batch=2, precision="bf16", rounds=2, compile=False, profile=True, json=False)
    result = json.loads(json.dumps(fit_vs_unet.compare(arguments)))
    rows = {(row["network"], row["step"]): row for row in result["rows"]}
    assert set(rows) == {(network, step) for network in ("FIT 500M", "U-Net 284M") for step in ("training", "sampling")}
    for row in rows.values():
        assert row["achieved"] == pytest.approx(row["flops"] / (row["milliseconds"] / 1000))
        assert row["of_peak"] == pytest.approx(row["achieved"] / result["matmul_peak"])
    for network in ("FIT 500M", "U-Net 284M"):
        assert rows[network, "training"]["flops"] > 2.5 * rows[network, "sampling"]["flops"]
    ratio = rows["U-Net 284M", "training"]["milliseconds"] / rows["FIT 500M", "training"]["milliseconds"]
    assert result["ratios"]["training"] == pytest.approx(ratio)
    assert "FIT 500M, training" in capsys.readouterr().out  # the profile
    assert f"{ratio:.2f} x as fast in training" in fit_vs_unet.report(result)
