"""Metrics of generated clips, through torchmetrics and transformers, with extractors from files on the disk.

Shapes: N clips of T frames, F features or classes; frames are (N, T, H, W, C) uint8 RGB.
"""

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore

from model import text
from model.errors import UserError

SCALES = {"bytes": (1.0, 0.0), "unit": (1 / 255, 0.0), "signed": (2 / 255, -1.0)}  # what frames are multiplied by, and added to


@dataclass(frozen=True)
class ExtractorConfig:
    """A network of features or class scores: a TorchScript file, as Inception and I3D for FID and FVD are handed around."""

    path: str
    sha256: str  # of the file, which is code: nothing of another hash is run
    kind: Literal["image", "video"] = "image"  # takes (N, C, H, W), or (N, C, T, H, W)
    size: tuple[int, int] | None = None  # height and width that it is given, bilinear with antialiasing; None: it scales itself
    values: Literal["bytes", "unit", "signed"] = "bytes"  # 0 to 255, 0 to 1, -1 to 1
    arguments: dict[str, bool] = field(default_factory=dict)  # such as return_features: true


class Extractor:
    """A loaded extractor.

    Raises:
        UserError: no such file, of another hash, or no TorchScript.
    """

    def __init__(self, config: ExtractorConfig, device: str | torch.device) -> None:
        path = Path(config.path).expanduser()
        if not path.is_file():
            raise UserError(f"extractor {path}: no such file")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != config.sha256:
            raise UserError(f"extractor {path}: its sha256 is {found}, the config says {config.sha256}")
        try:
            self.network = torch.jit.load(str(path), map_location=device).eval()
        except RuntimeError as error:
            raise UserError(f"extractor {path}: no TorchScript file: {str(error).splitlines()[0]}") from error
        self.config = config
        self.device = torch.device(device)

    @torch.no_grad()
    def __call__(self, frames: Tensor) -> Tensor:
        """Frames -> (N, F), or (N T, F) of an extractor of images, float32 on the CPU.

        Raises:
            UserError: it does not take such input, or its output is of another shape.
        """
        c = self.config
        images = frames.to(self.device).movedim(-1, -3).float()
        if c.size is not None:
            flat = functional.interpolate(images.flatten(0, 1), c.size, mode="bilinear", antialias=True)
            images = flat.unflatten(0, images.shape[:2])
        factor, offset = SCALES[c.values]
        images = images * factor + offset
        given = images.flatten(0, 1) if c.kind == "image" else images.movedim(2, 1)
        try:
            found = self.network(given, **c.arguments)
        except RuntimeError as error:
            told = [line for line in str(error).splitlines() if line.strip()][-1]
            raise UserError(f"extractor {c.path}: does not take {tuple(given.shape)}: {told}") from error
        if not isinstance(found, Tensor) or found.ndim < 2 or len(found) != len(given):
            raise UserError(f"extractor {c.path}: gives no row of numbers for each of {len(given)} inputs")
        return found.flatten(1).float().cpu()


class Frechet:
    """Frechet distance between the Gaussians of two sets of features (FID, FVD)."""

    def __init__(self, features: int) -> None:
        self.features = features
        self.metric = FrechetInceptionDistance(feature=_AsIs(features), sync_on_compute=False)  # add_up does

    def add_up(self, over_processes: Callable[[Tensor], Tensor], real: bool) -> None:
        """Make one of the sets' sums those of all processes."""
        for name in _sums_of(real):
            over_processes(getattr(self.metric, name))

    def add(self, features: Tensor, real: bool) -> None:
        """(N, F) features of one of the sets."""
        self.metric.update(features.double(), real=real)

    def value(self) -> float:
        """The squared distance; needs two samples of each set. Of fewer samples than features it says little."""
        return float(self.metric.compute())

    def sums(self, real: bool) -> dict[str, Tensor]:
        """The sums of one of the sets, to keep."""
        return {name: getattr(self.metric, name).clone() for name in _sums_of(real)}

    def restore(self, sums: Mapping[str, Tensor], real: bool) -> None:
        """Take up what ``sums`` gave."""
        for name in _sums_of(real):
            setattr(self.metric, name, sums[name])


def _sums_of(real: bool) -> list[str]:
    return [f"{'real' if real else 'fake'}_features_{name}" for name in ("sum", "cov_sum", "num_samples")]


class _AsIs(nn.Module):
    """Stands in torchmetrics' place for an extractor: features come extracted."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.num_features = features

    def forward(self, features: Tensor) -> Tensor:
        return features


def inception_score(logits: Tensor, splits: int) -> tuple[float, float | None]:
    """Of (N, F) class scores: exp of the mean divergence from the mean distribution; its mean and spread over splits."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # it shuffles before it splits
        warnings.simplefilter("ignore", UserWarning)  # that it keeps the scores, and that one split has no spread
        metric = InceptionScore(feature=_AsIs(logits.shape[1]), splits=splits, sync_on_compute=False)
        metric.update(logits)
        mean, spread = metric.compute()
    return float(mean), float(spread) if splits > 1 else None


class ClipSimilarity:
    """CLIPSIM: the cosine between a caption and each frame of its clip, mean over frames and clips (Wu et al. 2021).

    Raises:
        UserError: no CLIP model in the folder, or of another revision.
    """

    def __init__(self, folder: str, revision: str | None, device: str | torch.device) -> None:
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer  # imports take seconds

        if not Path(folder).expanduser().is_dir():
            raise UserError(f"clip: no such folder: {folder}")
        self.revision = text.revision(folder)
        if revision is not None and revision != self.revision:
            raise UserError(f"clip: {folder} has the revision {self.revision}, the config says {revision}")
        try:
            path = str(Path(folder).expanduser())
            self.model = CLIPModel.from_pretrained(path, use_safetensors=True).to(device).eval()
            self.processor = CLIPImageProcessor.from_pretrained(path)
            self.tokenizer = CLIPTokenizer.from_pretrained(path)
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"clip: {folder}: {' '.join(str(error).split())[:300]}") from error
        self.device = torch.device(device)

    @torch.no_grad()
    def __call__(self, frames: Tensor, captions: Sequence[str]) -> Tensor:
        """(N,) similarity of each clip with its caption."""
        pictures: Any = list(frames.flatten(0, 1).numpy())
        pixels = self.processor(pictures, return_tensors="pt")["pixel_values"].to(self.device)
        tokens = self.tokenizer(list(captions), padding=True, truncation=True, return_tensors="pt").to(self.device)
        seen = functional.normalize(self.model.get_image_features(pixels), dim=-1)
        said = functional.normalize(self.model.get_text_features(**tokens), dim=-1)
        cosines = torch.einsum("ntd,nd->nt", seen.unflatten(0, frames.shape[:2]), said)
        return cosines.mean(dim=1).cpu()
