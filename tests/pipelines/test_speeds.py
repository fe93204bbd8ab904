"""Settings of the sampler side by side."""

import json
from pathlib import Path

import pytest

from model import config
from model.errors import UserError
from pipelines.learned import LearnedConfig
from pipelines.speeds import SpeedsConfig, VariantConfig, speeds


def test_every_variant_is_timed_and_scored(
    learned_config: LearnedConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    yaml = tmp_path / "learned.yaml"
    yaml.write_text(config.to_yaml(learned_config))
    few, many = (
        VariantConfig("few", ("cascade.stage1_sampler.steps=2",)),
        VariantConfig("many", ("cascade.stage1_sampler.steps=40",)),
    )
    job = SpeedsConfig(str(yaml), str(tmp_path / "out"), (few, many), limit=4, rounds=2, batch=2)
    speeds(job)
    found = json.loads((tmp_path / "out" / "speeds.json").read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["few", "many"] and found["clips"] == 4
    assert rows["many"]["seconds"] > rows["few"]["seconds"] > 0  # 79 evaluations against 3
    for row in rows.values():
        assert row["spread"][0] <= row["seconds"] <= row["spread"][1]
        assert row["distance"] > 0 and 0 <= row["right"]["colour"] <= 1
    assert "| many | " in capsys.readouterr().out


def test_settings_that_cannot_be_are_told_before_anything_runs(learned_config: LearnedConfig, tmp_path: Path) -> None:
    yaml = tmp_path / "learned.yaml"
    yaml.write_text(config.to_yaml(learned_config))
    with pytest.raises(UserError, match="stepz"):
        speeds(SpeedsConfig(str(yaml), str(tmp_path), (VariantConfig("a", ("cascade.stage1_sampler.stepz=2",)),)))
    with pytest.raises(ValueError, match="name of its own"):
        SpeedsConfig(str(yaml), str(tmp_path), (VariantConfig("a"), VariantConfig("a")))
    with pytest.raises(ValueError, match="rounds"):
        SpeedsConfig(str(yaml), str(tmp_path), (VariantConfig("a"),), rounds=0)


def test_the_shipped_yaml_names_settings_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    shipped = config.load(SpeedsConfig, "yamls/learn/speeds.yaml")
    for variant in shipped.variants:
        config.load(LearnedConfig, shipped.learned, ["high=null", "cascade.stage2=null", *variant.overrides])
