"""Compare the clips of a sampling job with real ones: FID, FVD, CLIP-FID, inception score, CLIPSIM.

``python -m pipelines.evaluate yamls/evaluate.yaml generated=runs/samples reference=data/shards/stage1/videos``, or
``composer -n N pipelines/evaluate.py ...`` to share the clips among N. Writes evaluation.json beside the clips, and logs
to MLflow if asked to. Sums over the real clips are kept, and not computed again; a job that died goes on where it was.
"""

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Composer's launcher puts pipelines/ first on the path, where a file of ours could shadow a library.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

import torch  # noqa: E402
from mlflow import MlflowClient  # noqa: E402
from safetensors import SafetensorError  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor  # noqa: E402
from tqdm import tqdm  # noqa: E402

from model import command, config, media, registry  # noqa: E402
from model.data.shards import open_source  # noqa: E402
from model.errors import UserError  # noqa: E402
from model.registry import TrackingConfig  # noqa: E402
from pipelines.clips import Made, RealClips, made  # noqa: E402
from pipelines.metrics import ClipSimilarity, Extractor, ExtractorConfig, Frechet, inception_score  # noqa: E402
from pipelines.ranks import Ranks, default_device  # noqa: E402
from pipelines.results import PublishedConfig, Result, beside  # noqa: E402
from pipelines.unfinished import Unfinished  # noqa: E402


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
    clip_fid: ExtractorConfig | None = None  # features of images by CLIP
    inception: ExtractorConfig | None = None  # class scores, of images or videos
    clip: ClipModelConfig | None = None
    frames: int = 16  # of a clip that are seen, from its first on
    frame_rate: float = 24.0  # of the real clips; must be that of the generated ones
    image_frames: int = 1  # of these, evenly spaced, that extractors of images see
    square: bool = False  # cut out the square in the middle of both sets' frames
    splits: int = 10  # of the inception score
    limit: int | None = None  # clips of each set; None: all
    batch: int = 16
    cache: str = "runs/evaluation"  # sums over real clips
    device: str | None = None  # None: a GPU if there is one
    tracking: TrackingConfig | None = None  # where to log the result; None: nowhere
    seed: int = 0  # of the windows drawn from the real clips
    published: tuple[PublishedConfig, ...] = ()  # to show beside the result

    def __post_init__(self) -> None:
        for name in ("frames", "image_frames", "splits", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not any((*self.distances.values(), self.inception, self.clip)):
            raise ValueError("name an extractor: fid, fvd, clip_fid, inception or clip")
        if self.distances and self.reference is None:
            raise ValueError(f"{', '.join(self.distances)} compare with real clips: name a reference")

    @property
    def distances(self) -> dict[str, ExtractorConfig]:
        """The extractors of those metrics that compare with real clips."""
        named = {"fid": self.fid, "fvd": self.fvd, "clip_fid": self.clip_fid}
        return {name: extractor for name, extractor in named.items() if extractor is not None}


def evaluate(c: EvaluateConfig) -> None:
    """Run the job.

    Raises:
        UserError: clips, real ones or extractors that are missing or do not fit.
    """
    ranks = Ranks.join()
    device = c.device or default_device()
    folder = Path(c.generated)
    listed = _listed(folder, c)
    distances = [_Distance(name, Extractor(extractor, device), c) for name, extractor in c.distances.items()]
    measures: list[_Distance | _Scores | _Similarity] = [*distances]
    if c.inception is not None:
        measures.append(_Scores(Extractor(c.inception, device), c))
    if c.clip is not None:
        measures.append(_Similarity(c.clip, c, device))
    missing = [distance for distance in distances if not distance.take_up(ranks)]
    if missing:
        sums = [distance.of_real for distance in missing]
        unfinished = Unfinished(Path(c.cache), [distance.cached.name for distance in missing], ranks, [*sums])
        for frames in _real(c, ranks, unfinished.done):
            for distance in missing:
                distance.add_real(frames)
            unfinished.advance(len(frames))
        for distance in missing:
            distance.keep(ranks)
        unfinished.drop()
    unfinished = Unfinished(Path(c.cache), _job(c, listed), ranks, [measure.of_generated for measure in measures])
    for numbers, frames, captions in _generated(listed, c, ranks, unfinished.done):
        for measure in measures:
            measure.add(numbers, frames, captions)
        unfinished.advance(len(numbers))
    results = [measure.result(ranks, len(listed)) for measure in measures]
    if ranks.rank == 0:
        _report(c, folder, results)
    unfinished.drop()


def _job(c: EvaluateConfig, listed: list[Made]) -> list[Any]:
    """What the numbers of the generated clips depend on."""
    extractors = [asdict(e) | {"path": ""} for e in (*c.distances.values(), c.inception) if e is not None]
    clips = [[entry.path.name, entry.prompt, *_version(entry.path)] for entry in listed]
    return [str(Path(c.generated).resolve()), c.frames, c.frame_rate, c.image_frames, c.square, extractors, str(c.clip), clips]


def _version(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return 0, 0  # told when it is read
    return found.st_size, found.st_mtime_ns


def _listed(folder: Path, c: EvaluateConfig) -> list[Made]:
    clips = made(folder)
    if len(clips) < 2:
        raise UserError(f"{folder}: holds {len(clips)} clips; a comparison needs at least two")
    return clips[: c.limit]


def _generated(listed: list[Made], c: EvaluateConfig, ranks: Ranks, done: int) -> Iterator[tuple[range, Tensor, list[str]]]:
    """This process's generated clips: their numbers in the list, (N, T, H, W, C) uint8, and their captions.

    Raises:
        UserError: one is missing, shorter, or of another frame rate.
    """
    for numbers in _share(len(listed), c, ranks, "generated clips", done):
        part = [listed[number] for number in numbers]
        clips = [media.read_video(entry.path, c.frames) for entry in part]
        for entry, clip in zip(part, clips, strict=True):
            if len(clip.frames) < c.frames or abs(clip.frame_rate - c.frame_rate) > 0.01:
                found = f"{len(clip.frames)} frames at {clip.frame_rate:g} per second"
                raise UserError(f"{entry.path.name}: {found}, but the config asks for {c.frames} at {c.frame_rate:g}")
        frames = torch.stack([torch.from_numpy(clip.frames) for clip in clips])
        yield numbers, _cut(frames, c), [entry.prompt for entry in part]


def _share(count: int, c: EvaluateConfig, ranks: Ranks, title: str, done: int) -> Iterator[range]:
    """This process's numbers below ``count``, every ``world``-th one, in batches; without the first ``done``."""
    mine = range(ranks.rank, count, ranks.world)
    with tqdm(total=len(mine), initial=done, desc=title, unit="clip", disable=ranks.rank > 0) as bar:
        for start in range(done, len(mine), c.batch):
            batch = mine[start : start + c.batch]
            yield batch
            bar.update(len(batch))


def _cut(frames: Tensor, c: EvaluateConfig) -> Tensor:
    """(N, T, H, W, C), or the square in its middle."""
    if not c.square:
        return frames
    side = min(frames.shape[2:4])
    top, left = ((length - side) // 2 for length in frames.shape[2:4])
    return frames[:, :, top : top + side, left : left + side]


def _real(c: EvaluateConfig, ranks: Ranks, done: int) -> Iterator[Tensor]:
    """This process's clips of the reference, (N, T, H, W, C) uint8; which part of a long one is seen is drawn from the seed."""
    clips = RealClips(str(c.reference), c.frames, (c.frame_rate,), c.seed)
    for numbers in _share(min(len(clips), c.limit or len(clips)), c, ranks, "real clips", done):
        yield _cut(torch.stack([clips.read(number).frames for number in numbers]), c)


def _seen(extractor: Extractor, frames: Tensor, c: EvaluateConfig) -> Tensor:
    """Of (N, T, H, W, C) the frames that the extractor takes."""
    if extractor.config.kind == "video":
        return frames
    picked = torch.linspace(0, frames.shape[1] - 1, c.image_frames + 2)[1:-1].round().long()
    return frames[:, picked]


class _Sums:
    """The sums over one of a distance's sets, as far as they are."""

    def __init__(self, owner: "_Distance", real: bool) -> None:
        self.owner, self.real = owner, real

    def state(self) -> dict[str, Tensor]:
        return self.owner.distance.sums(self.real) if self.owner.distance else {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        if state:
            width = len(next(value for name, value in state.items() if name.endswith("features_sum")))
            self.owner.distance = self.owner.distance or Frechet(width)
            self.owner.distance.restore(state, self.real)


class _Distance:
    """A Frechet distance: FID, FVD or CLIP-FID."""

    def __init__(self, name: str, extractor: Extractor, c: EvaluateConfig) -> None:
        self.name, self.extractor, self.c = name, extractor, c
        self.cached = Path(c.cache, f"{name}-{_reference_key(extractor, c)}.safetensors")
        self.distance: Frechet | None = None
        self.of_real, self.of_generated = _Sums(self, real=True), _Sums(self, real=False)

    def take_up(self, ranks: Ranks) -> bool:
        """The sums over the real clips from an earlier job, on the first process; whether there are any."""
        sums = _cached(self.cached) if ranks.rank == 0 else None
        if sums is not None:
            self.of_real.restore(sums)
        return bool(ranks.most(sums is not None))

    def keep(self, ranks: Ranks) -> None:
        """Keep the sums over the real clips of all processes, on the first one."""
        self._require(ranks, f"{self.c.reference}: holds no clips").add_up(ranks.add, real=True)
        if ranks.rank == 0 and self.distance is not None:
            self.cached.parent.mkdir(parents=True, exist_ok=True)
            save_file(self.distance.sums(real=True), self.cached)

    def add_real(self, frames: Tensor) -> None:
        self._add(frames, real=True)

    def add(self, numbers: range, frames: Tensor, captions: list[str]) -> None:
        del numbers, captions
        self._add(frames, real=False)

    def _add(self, frames: Tensor, real: bool) -> None:
        features = self.extractor(_seen(self.extractor, frames, self.c))
        self.distance = self.distance or Frechet(features.shape[1])
        self.distance.add(features, real)

    def _require(self, ranks: Ranks, otherwise: str) -> Frechet:
        """The distance, also in a process that had no clip."""
        width = ranks.most(self.distance.features if self.distance else 0)
        if not width:
            raise UserError(otherwise)
        self.distance = self.distance or Frechet(width)
        return self.distance

    def result(self, ranks: Ranks, clips: int) -> Result:
        del clips
        distance = self._require(ranks, f"{self.name}: no clips")
        distance.add_up(ranks.add, real=False)
        if ranks.rank > 0:
            return Result(self.name, 0.0, None, 0, 0, "", "")  # the first process has the real clips' sums
        counts = [int(getattr(distance.metric, f"{which}_features_num_samples")) for which in ("fake", "real")]
        if min(counts) < 2:
            raise UserError(f"{self.name}: {counts[0]} generated and {counts[1]} real samples; it needs two of each")
        return Result(self.name, distance.value(), None, counts[0], counts[1], *_described(self.extractor, self.c))


class _Gathered:
    """Numbers of each clip, in the order of the clips whichever process had them."""

    def __init__(self) -> None:
        self.rows: dict[int, Tensor] = {}

    def add(self, numbers: range, values: Tensor) -> None:
        """(N, K, F) of N clips."""
        self.rows.update(zip(numbers, values, strict=True))

    def state(self) -> dict[str, Tensor]:
        numbers = sorted(self.rows)
        return (
            {"numbers": torch.tensor(numbers), "rows": torch.stack([self.rows[number] for number in numbers])} if numbers else {}
        )

    def restore(self, state: Mapping[str, Tensor]) -> None:
        if state:
            self.rows = dict(zip(state["numbers"].tolist(), state["rows"], strict=True))

    def all(self, ranks: Ranks, clips: int) -> Tensor:
        """(clips, K, F) of all processes."""
        shape = next((row.shape for row in self.rows.values()), (0, 0))
        table = torch.zeros(clips, *(ranks.most(length) for length in shape))
        for number, row in self.rows.items():
            table[number] = row
        return ranks.add(table)


class _Scores:
    """The inception score."""

    def __init__(self, extractor: Extractor, c: EvaluateConfig) -> None:
        self.extractor, self.c = extractor, c
        self.logits = self.of_generated = _Gathered()

    def add(self, numbers: range, frames: Tensor, captions: list[str]) -> None:
        del captions
        self.logits.add(numbers, self.extractor(_seen(self.extractor, frames, self.c)).unflatten(0, (len(numbers), -1)))

    def result(self, ranks: Ranks, clips: int) -> Result:
        logits = self.logits.all(ranks, clips).flatten(0, 1)
        if len(logits) < self.c.splits:
            raise UserError(f"{len(logits)} samples do not split into {self.c.splits}: lower splits")
        mean, spread = inception_score(logits, self.c.splits)
        return Result("inception_score", mean, spread, len(logits), None, *_described(self.extractor, self.c))


class _Similarity:
    """CLIPSIM."""

    def __init__(self, model: ClipModelConfig, c: EvaluateConfig, device: str) -> None:
        self.similarity = ClipSimilarity(model.path, model.revision, device)
        self.model = f"{model.path} ({self.similarity.revision})"
        self.detail = f"{c.frames} frames{_shape(c)}, the model's own scaling"
        self.values = self.of_generated = _Gathered()

    def add(self, numbers: range, frames: Tensor, captions: list[str]) -> None:
        self.values.add(numbers, self.similarity(frames, captions)[:, None, None])

    def result(self, ranks: Ranks, clips: int) -> Result:
        values = self.values.all(ranks, clips).flatten()
        return Result("clipsim", float(values.mean()), None, len(values), None, self.model, self.detail)


def _shape(c: EvaluateConfig) -> str:
    return ", squares in the middle" if c.square else ""


def _reference_key(extractor: Extractor, c: EvaluateConfig) -> str:
    """What the sums over the real clips depend on."""
    folder = open_source(str(c.reference), None).folder
    files = b"\0".join((folder / name).read_bytes() for name in ("manifest.json", "index.json"))
    settings = [asdict(extractor.config) | {"path": ""}, c.frames, c.frame_rate, c.image_frames, c.square, c.limit, c.seed]
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
    return f"{e.path} ({e.sha256[:12]})", f"{count} frame{'s' if count != 1 else ''} of each clip{_shape(c)}, {size}"


def _report(c: EvaluateConfig, folder: Path, results: list[Result]) -> None:
    path = folder / "evaluation.json"
    tree = {"results": [asdict(result) for result in results], "config": config.to_tree(c)}
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    for r in results:
        spread = "" if r.spread is None else f" +- {r.spread:.3f}"
        against = "" if r.reference_samples is None else f" against {r.reference_samples} real"
        print(f"{r.metric:16}{r.value:12.4f}{spread}   {r.samples} samples{against}; {r.detail}; {r.extractor}")
    if c.published:
        print(beside(results, c.published))
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
