"""Metrics that were measured, beside those of published tables."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedConfig:
    """A line of a published table, to be shown beside."""

    system: str
    fid: float | None = None
    fvd: float | None = None
    clip_fid: float | None = None
    inception_score: float | None = None
    clipsim: float | None = None


@dataclass(frozen=True)
class Result:
    """One metric."""

    metric: str
    value: float
    spread: float | None  # over splits
    samples: int  # generated, of frames where images are seen
    reference_samples: int | None
    extractor: str
    detail: str  # how the extractor saw the clips


def beside(results: list[Result], published: tuple[PublishedConfig, ...]) -> str:
    """A table of the metrics measured, with published ones below."""
    names = [result.metric for result in results]
    rows = [("this run", [result.value for result in results])]
    rows += [(line.system, [getattr(line, name) for name in names]) for line in published]
    width = max(len(system) for system, _ in rows)
    lines = [f"{'':{width}}" + "".join(f"{name:>17}" for name in names)]
    for system, values in rows:
        lines.append(f"{system:{width}}" + "".join(f"{'-':>17}" if value is None else f"{value:17.4g}" for value in values))
    return "\n".join(lines)
