"""Ablations: equal compute, means and spreads against closed forms, and settings that would fail after hours."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from model import config
from model.errors import UserError
from pipelines import ablations
from pipelines.ablations import METRICS, AblationsConfig, Measured, VariantConfig

REPOSITORY = Path(__file__).parents[2]
YAML = "yamls/learn/ablations.yaml"


def test_the_shipped_variants_are_accepted_by_training_and_differ() -> None:
    c = config.load(AblationsConfig, YAML, [])
    trees = []
    for variant in c.variants:
        told = config.load(ablations.TrainConfig, variant.train or c.train, ablations._training(c, variant, 0, 1))
        assert (told.name, told.publish.name) == (f"{variant.name}-0", f"ablation-{variant.name}-0")
        trees.append(json.dumps(config.to_tree(replace(told, name="", publish=None, schedule=replace(told.schedule, steps=1)))))
    assert len(set(trees)) == len(trees)


def test_a_variant_of_double_cost_takes_half_the_steps() -> None:
    c = AblationsConfig((VariantConfig("plain"), VariantConfig("double", ("global_batch=32",))), teraflops=1.0)
    plain, double = (ablations._steps(c, variant) for variant in c.variants)
    assert plain > 50 and abs(plain - 2 * double) <= 1
    deeper = ablations._steps(c, VariantConfig("deeper", ("model.network.blocks=6",)))
    assert 0.4 < deeper / plain < 0.6
    with pytest.raises(UserError, match=r"plain: a step takes 0\.\d+ teraflops, more than the run's 1e-06"):
        ablations._steps(replace(c, teraflops=1e-6), c.variants[0])


def test_table_shows_mean_and_spread() -> None:
    c = AblationsConfig((VariantConfig("one"), VariantConfig("other")))
    found = [Measured("one", seed, 10, dict.fromkeys(METRICS, value)) for seed, value in enumerate((1.0, 2.0, 3.0))]
    lines = ablations._table(c, [*found, Measured("other", 0, 20, dict.fromkeys(METRICS, 7.0))]).splitlines()
    assert lines[2] == "| one | 10 |" + " 2 ± 1 |" * len(METRICS)
    assert lines[3] == "| other | 20 |" + " 7 |" * len(METRICS)


def test_numbers_have_no_exponents() -> None:
    assert [ablations._plain(value, 3) for value in (2503.4, 100.4, 56.67, 0.01234, 0.000021, 0.0)] == [
        "2503", "100", "56.7", "0.0123", "0.00002", "0",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"variants": (VariantConfig("a/b"),)}, "variants must have names of letters"),
        ({"variants": (VariantConfig("a"), VariantConfig("a"))}, "each its own"),
        ({"seeds": (1, 1)}, "each once"),
        ({"teraflops": 0.0}, "teraflops above 0"),
    ],
)
def test_settings_that_cannot_be(wrong: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        replace(AblationsConfig((VariantConfig("a"),)), **wrong)


def test_what_would_fail_after_hours_is_told_first(tmp_path: Path) -> None:
    c = AblationsConfig((VariantConfig("a", ("optimizer.rate=1",)),), output=str(tmp_path / "out"), folder=str(tmp_path))
    with pytest.raises(UserError, match="optimizer.rate"):
        ablations.ablations(c)
    with pytest.raises(UserError, match="no shards; make learn prepares them"):
        ablations.ablations(replace(c, variants=(VariantConfig("a"),)))
    assert not (tmp_path / "out").exists()
