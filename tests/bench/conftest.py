"""What the comparisons' tests share."""

from pathlib import Path

import pytest

YAMLS = Path(__file__).parents[2] / "yamls"
SMALL_FIT = """
base: {yamls}/stage1_500m.yaml
model:
  codec: {{ height: 6, width: 16, pad_bottom: 2 }}
  network: {{ size: [4, 8, 16], group: [4, 2, 4], patch_width: 48, latent_tokens: 8, latent_width: 64, blocks: 1,
    global_layers: 1, conditioning_width: 64, text_width: 8 }}
data: {{ frames: 4 }}
"""


@pytest.fixture
def small_fit(tmp_path: Path) -> Path:
    """The yaml of a FIT of some thousand parameters, with the shape of FIT 500M."""
    yaml = tmp_path / "fit.yaml"
    yaml.write_text(SMALL_FIT.format(yamls=YAMLS))
    return yaml
