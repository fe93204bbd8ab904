"""Compare the clips of a sampling job with real ones: FID, FVD, inception score, CLIPSIM.

``python -m pipelines.evaluate yamls/evaluate.yaml generated=runs/samples reference=data/shards/stage1/videos``. Writes
evaluation.json beside the clips, and logs to MLflow if asked to. Sums over the real clips are kept, and not computed again.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from mlflow import MlflowClient
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from streaming import LocalDataset
from torch import Tensor
from tqdm import tqdm

from model import command, config, media, registry
from model.config import UserError
from model.data.samples import View, decode_sample, derived_seed
from model.data.shards import open_source
from model.registry import TrackingConfig
from pipelines.metrics import ClipSimilarity, Extractor, ExtractorConfig, Frechet, inception_score


@dataclass(frozen=True)
class ClipModelConfig:
    """A CLIP model in a local folder, as transformers saves it, with safetensors."""

    path: str
    revision: str | None = None  # hash of the folder's files, which evaluation.json names; if given, it must be this one


@dataclass(frozen=True)
class EvaluateConfig:
    """What to compare, by what. A metric whose extractor is null is left out."""

    generated: str  # folder of a sampling job
    reference: str | None = None  # dataset of real clips, for fid and fvd
    fid: ExtractorConfig | None = None  # features of images
    fvd: ExtractorConfig | None = None  # features of videos
    inception: ExtractorConfig | None = None  # class scores, of images or videos
    clip: ClipModelConfig | None = None
    frames: int = 16  # of a clip that are seen, from its first on
    frame_rate: float = 24.0  # of the real clips; must be that of the generated ones
    image_frames: int = 1  # of these, evenly spaced, that extractors of images see
    splits: int = 10  # of the inception score
    limit: int | None = None  # clips of each set; None: all
    batch: int = 16
    cache: str = "runs/evaluation"  # sums over real clips
    device: str | None = None  # None: a GPU if there is one
    tracking: TrackingConfig | None = None  # where to log the result; None: nowhere
    seed: int = 0  # of the windows drawn from the real clips

    def __post_init__(self) -> None:
        for name in ("frames", "image_frames", "splits", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not any((self.fid, self.fvd, self.inception, self.clip)):
            raise ValueError("name an extractor: fid, fvd, inception or clip")
        if (self.fid or self.fvd) and self.reference is None:
            raise ValueError("fid and fvd compare with real clips: name a reference")


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


def evaluate(c: EvaluateConfig) -> None:
    """Run the job.

    Raises:
        UserError: clips, real ones or extractors that are missing or do not fit.
    """
    device = c.device or ("cuda" if torch.cuda.is_available() else "cpu")
    folder = Path(c.generated)
    listed = _listed(folder, c)
    distances = [_Distance(name, Extractor(e, device), c) for name, e in (("fid", c.fid), ("fvd", c.fvd)) if e is not None]
    measures: list[_Distance | _Scores | _Similarity] = [*distances]
    if c.inception is not None:
        measures.append(_Scores(Extractor(c.inception, device), c))
    if c.clip is not None:
        measures.append(_Similarity(c.clip, c, device))
    missing = [distance for distance in distances if not distance.take_up()]
    if missing:
        for frames in _real(c):
            for distance in missing:
                distance.add_real(frames)
        for distance in missing:
            distance.keep()
    for frames, captions in _generated(folder, listed, c):
        for measure in measures:
            measure.add(frames, captions)
    _report(c, folder, [measure.result() for measure in measures])


def _listed(folder: Path, c: EvaluateConfig) -> list[dict[str, Any]]:
    try:
        clips = json.loads((folder / "samples.json").read_text(encoding="utf-8"))["clips"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: not the folder of a finished sampling job: {error}") from error
    if len(clips) < 2:
        raise UserError(f"{folder}: holds {len(clips)} clips; a comparison needs at least two")
    return list(clips[: c.limit])


def _generated(folder: Path, listed: list[dict[str, Any]], c: EvaluateConfig) -> Iterator[tuple[Tensor, list[str]]]:
    """The generated clips, (N, T, H, W, C) uint8, with their captions.

    Raises:
        UserError: one is missing, shorter, or of another frame rate.
    """
    for start in tqdm(range(0, len(listed), c.batch), "generated clips", unit="batch"):
        part = listed[start : start + c.batch]
        clips = [media.read_video(folder / Path(entry["file"]).name, c.frames) for entry in part]
        for entry, clip in zip(part, clips, strict=True):
            if len(clip.frames) < c.frames or abs(clip.frame_rate - c.frame_rate) > 0.01:
                found = f"{len(clip.frames)} frames at {clip.frame_rate:g} per second"
                raise UserError(f"{entry['file']}: {found}, but the config asks for {c.frames} at {c.frame_rate:g}")
        yield torch.stack([torch.from_numpy(clip.frames) for clip in clips]), [entry["prompt"] for entry in part]


def _real(c: EvaluateConfig) -> Iterator[Tensor]:
    """Clips of the reference, (N, T, H, W, C) uint8; which part of a long one is seen is drawn from the seed."""
    source = open_source(str(c.reference), None)
    text_config = source.manifest.text
    view = View(c.frames, (c.frame_rate,), text_config.width, text_config.max_tokens, c.seed)
    rows = LocalDataset(str(source.folder))
    count = min(len(rows), c.limit or len(rows))
    for start in tqdm(range(0, count, c.batch), "real clips", unit="batch"):
        try:
            numbers = range(start, min(start + c.batch, count))
            samples = [decode_sample(rows[n], source.manifest, view, derived_seed(c.seed, n)) for n in numbers]
        except (ValueError, RuntimeError) as error:
            raise UserError(f"{source.location}: {error}") from error
        yield torch.stack([sample.frames for sample in samples])


def _seen(extractor: Extractor, frames: Tensor, c: EvaluateConfig) -> Tensor:
    """Of (N, T, H, W, C) the frames that the extractor takes."""
    if extractor.config.kind == "video":
        return frames
    picked = torch.linspace(0, frames.shape[1] - 1, c.image_frames + 2)[1:-1].round().long()
    return frames[:, picked]


class _Distance:
    """FID or FVD."""

    def __init__(self, name: str, extractor: Extractor, c: EvaluateConfig) -> None:
        self.name, self.extractor, self.c = name, extractor, c
        self.cached = Path(c.cache, f"{name}-{_reference_key(extractor, c)}.safetensors")
        self.distance: Frechet | None = None

    def take_up(self) -> bool:
        """The sums over the real clips from an earlier job; whether there are any."""
        sums = _cached(self.cached)
        if sums is not None:
            self.distance = Frechet(len(sums["real_features_sum"]))
            self.distance.restore(sums)
        return sums is not None

    def keep(self) -> None:
        """Keep the sums over the real clips."""
        if self.distance is None:
            raise UserError(f"{self.c.reference}: holds no clips")
        self.cached.parent.mkdir(parents=True, exist_ok=True)
        save_file(self.distance.reference(), self.cached)

    def add_real(self, frames: Tensor) -> None:
        self._add(frames, real=True)

    def add(self, frames: Tensor, captions: list[str]) -> None:
        del captions
        self._add(frames, real=False)

    def _add(self, frames: Tensor, real: bool) -> None:
        features = self.extractor(_seen(self.extractor, frames, self.c))
        self.distance = self.distance or Frechet(features.shape[1])
        self.distance.add(features, real)

    def result(self) -> Result:
        assert self.distance is not None
        counts = [int(getattr(self.distance.metric, f"{which}_features_num_samples")) for which in ("fake", "real")]
        if min(counts) < 2:
            raise UserError(f"{self.name}: {counts[0]} generated and {counts[1]} real samples; it needs two of each")
        return Result(self.name, self.distance.value(), None, counts[0], counts[1], *_described(self.extractor, self.c))


class _Scores:
    """The inception score."""

    def __init__(self, extractor: Extractor, c: EvaluateConfig) -> None:
        self.extractor, self.c = extractor, c
        self.logits: list[Tensor] = []

    def add(self, frames: Tensor, captions: list[str]) -> None:
        del captions
        self.logits.append(self.extractor(_seen(self.extractor, frames, self.c)))

    def result(self) -> Result:
        logits = torch.cat(self.logits)
        if len(logits) < self.c.splits:
            raise UserError(f"{len(logits)} samples do not split into {self.c.splits}: lower splits")
        mean, spread = inception_score(logits, self.c.splits)
        return Result("inception_score", mean, spread, len(logits), None, *_described(self.extractor, self.c))


class _Similarity:
    """CLIPSIM."""

    def __init__(self, model: ClipModelConfig, c: EvaluateConfig, device: str) -> None:
        self.similarity = ClipSimilarity(model.path, model.revision, device)
        self.model = f"{model.path} ({self.similarity.revision})"
        self.detail = f"{c.frames} frames, the model's own scaling"
        self.values: list[Tensor] = []

    def add(self, frames: Tensor, captions: list[str]) -> None:
        self.values.append(self.similarity(frames, captions))

    def result(self) -> Result:
        values = torch.cat(self.values)
        return Result("clipsim", float(values.mean()), None, len(values), None, self.model, self.detail)


def _reference_key(extractor: Extractor, c: EvaluateConfig) -> str:
    """What the sums over the real clips depend on."""
    folder = open_source(str(c.reference), None).folder
    files = b"\0".join((folder / name).read_bytes() for name in ("manifest.json", "index.json"))
    settings = [asdict(extractor.config) | {"path": ""}, c.frames, c.frame_rate, c.image_frames, c.limit, c.seed]
    return hashlib.sha256(files + json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _cached(path: Path) -> dict[str, Tensor] | None:
    try:
        return load_file(path) if path.is_file() else None
    except SafetensorError:  # cut short
        return None


def _described(extractor: Extractor, c: EvaluateConfig) -> tuple[str, str]:
    e = extractor.config
    size = "its own scaling" if e.size is None else f"scaled to {e.size[0]}x{e.size[1]}, bilinear, antialiased"
    count = c.frames if e.kind == "video" else c.image_frames
    return f"{e.path} ({e.sha256[:12]})", f"{count} frame{'s' if count != 1 else ''} of each clip, {size}"


def _report(c: EvaluateConfig, folder: Path, results: list[Result]) -> None:
    path = folder / "evaluation.json"
    tree = {"results": [asdict(result) for result in results], "config": config.to_tree(c)}
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    for r in results:
        spread = "" if r.spread is None else f" +- {r.spread:.3f}"
        against = "" if r.reference_samples is None else f" against {r.reference_samples} real"
        print(f"{r.metric:16}{r.value:12.4f}{spread}   {r.samples} samples{against}; {r.detail}; {r.extractor}")
    print(f"written to {path}")
    if c.tracking is not None:
        client = MlflowClient(c.tracking.uri)
        run = client.create_run(registry.ensure_experiment(c.tracking), run_name=f"evaluate {folder.name}")
        for r in results:
            client.log_metric(run.info.run_id, f"evaluation/{r.metric}", r.value)
        client.log_text(run.info.run_id, path.read_text(encoding="utf-8"), "evaluation.json")
        client.set_terminated(run.info.run_id)
        print(f"logged to MLflow at {c.tracking.uri}, run {run.info.run_id}")


if __name__ == "__main__":
    command.run(
        EvaluateConfig, evaluate, __doc__ or "", example="python -m pipelines.evaluate yamls/evaluate.yaml generated=runs/samples"
    )
