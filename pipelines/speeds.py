"""How fast and how right: settings of the sampler side by side, on Moving Scenes.

``python -m pipelines.speeds yamls/learn/speeds.yaml``. Every variant samples a clip for each held-out caption, from which the
truth is read back (``pipelines.learned``); seconds per clip are the median over rounds in which the variants take turns. Prints
a table in Markdown and writes speeds.json.
"""

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tqdm import tqdm

from model import command, config
from pipelines.cascade import Cascade
from pipelines.learned import Example, LearnedConfig, examples, sample, scored
from pipelines.moving_scenes import distance
from pipelines.ranks import default_device


@dataclass(frozen=True)
class VariantConfig:
    """Settings to try."""

    name: str
    overrides: tuple[str, ...] = ()  # key=value for the yaml of pipelines.learned


@dataclass(frozen=True)
class SpeedsConfig:
    """Which settings, on which clips."""

    learned: str  # yaml of pipelines.learned: models and held-out clips
    output: str  # folder
    variants: tuple[VariantConfig, ...]
    limit: int | None = None  # held-out clips; null: as many as the yaml says
    rounds: int = 3  # of timing
    batch: int = 8  # clips that are timed together

    def __post_init__(self) -> None:
        if not self.variants or len({variant.name for variant in self.variants}) < len(self.variants):
            raise ValueError("variants must name at least one, each by a name of its own")
        for name in ("rounds", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Row:
    """What a variant costs and gives."""

    name: str
    seconds: float  # per clip, median
    spread: tuple[float, float]  # least and most of the rounds
    right: dict[str, float]  # share of the clips, by property
    distance: float  # Frechet distance of simple features to the real clips


@dataclass(frozen=True)
class _Ready:
    name: str
    config: LearnedConfig
    cascade: Cascade

    def sample(self, asked: Sequence[Example]) -> float:
        """Seconds per clip."""
        begin = time.perf_counter()
        sample(self.config, self.cascade, asked, self.name)
        return (time.perf_counter() - begin) / len(asked)


def speeds(c: SpeedsConfig) -> None:
    """Sample, score, time and write.

    Raises:
        UserError: settings, models or data sets that are missing or do not fit.
    """
    limit = () if c.limit is None else (f"limit={c.limit}",)
    configs = [
        config.load(LearnedConfig, c.learned, ["high=null", "cascade.stage2=null", *limit, *v.overrides]) for v in c.variants
    ]
    ready = [
        _Ready(variant.name, loaded, Cascade(loaded.cascade, loaded.device or default_device()))
        for variant, loaded in zip(c.variants, configs, strict=True)
    ]
    stage1 = ready[0].cascade.stage1
    assert stage1 is not None
    asked = examples(configs[0], stage1.denoiser.config.network.size[0])
    real = scored(configs[0], asked)
    found = {}
    for variant in ready:
        made = sample(variant.config, variant.cascade, asked, variant.name)  # also the first call, which compiles
        found[variant.name] = scored(variant.config, asked, made)
    timed: dict[str, list[float]] = {variant.name: [] for variant in ready}
    part = [replace(example, frame_rate=asked[0].frame_rate) for example in asked[: c.batch]]  # one batch
    for variant in ready:
        variant.sample(part)  # another size of batch may be compiled anew
    with tqdm(total=c.rounds * len(ready), desc="timing", unit="variant") as bar:
        for _ in range(c.rounds):
            for variant in ready:
                timed[variant.name].append(variant.sample(part))
                bar.update()
    rows = [
        Row(
            name,
            statistics.median(timed[name]),
            (min(timed[name]), max(timed[name])),
            {rate.name: rate.right / rate.number for rate in score.rates},
            distance(score.features, real.features),
        )
        for name, score in found.items()
    ]
    output = Path(c.output)
    output.mkdir(parents=True, exist_ok=True)
    tree = {"clips": len(asked), "rows": [asdict(row) for row in rows], "config": config.to_tree(c)}
    (output / "speeds.json").write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    print(f"\n{markdown(rows)}\n\n{len(asked)} clips; numbers: {output / 'speeds.json'}")


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table."""
    names = list(rows[0].right)
    lines = ["| | seconds a clip | " + " | ".join(names) + " | distance |", "|---" * (len(names) + 3) + "|"]
    for row in rows:
        shares = " | ".join(f"{row.right[name]:.1%}" for name in names)
        lines.append(
            f"| {row.name} | {row.seconds:.3f} ({row.spread[0]:.3f} to {row.spread[1]:.3f}) | {shares} | {row.distance:.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    command.run(SpeedsConfig, speeds, __doc__ or "", example="python -m pipelines.speeds yamls/learn/speeds.yaml limit=32")
