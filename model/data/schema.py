"""The contract between dataprep and training: the MDS columns and the manifest of a dataset. Standard library only.

One dataset is one folder of MDS shards with a ``manifest.json``. Each cascade stage has its own folders, because MDS reads every
column of a sample: ``stage1/videos``, ``stage1/images``, ``stage2/videos``, ``stage2/images``.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"

# Column -> MDS encoding. T = stored frames, L = text tokens, D = width of the text states.
COLUMNS: dict[str, str] = {
    "key": "str",  # unique within the dataset: the source item's key and the clip's number
    "caption": "str",
    "frames": "bytes",  # the T frames, one behind the other: raw RGB (H W 3, uint8) or JPEG, see Manifest.frame_format
    "frame_ends": "ndarray:uint32",  # (T,) byte offset at which each frame ends
    "start_seconds": "float64",  # where the clip begins in its source; 0 for images
    "source_height": "int",  # size of the upright source before resize and crop: the original-resolution conditioning
    "source_width": "int",
    "text": "ndarray:uint16",  # (L, D) T5 states, the bits of bfloat16 (MDS has no bfloat16); ragged, L >= 1
}

Kind = Literal["videos", "images"]
FrameFormat = Literal["raw", "jpeg"]


class SchemaError(ValueError):
    """A dataset is not what the reader asks for; one sentence says what differs."""


@dataclasses.dataclass(frozen=True)
class TextManifest:
    """Which encoder made the text states."""

    encoder: str  # a local path or hub name from which the encoder loads
    revision: str  # content hash (local path) or hub commit
    width: int  # D
    dtype: str  # "bfloat16"
    max_tokens: int  # captions are cut to this many tokens, the end token included


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a dataset folder holds."""

    kind: Kind
    height: int  # pixels
    width: int
    frame_rate: float  # of the stored frames, per second; 0 for images
    max_frames: int  # a sample holds at most this many frames; 1 for images
    frame_format: FrameFormat
    num_samples: int
    text: TextManifest
    commit: str = "unknown"  # git commit of the code that wrote it
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    def write(self, folder: str | Path) -> None:
        """Write ``manifest.json`` into ``folder``."""
        Path(folder, MANIFEST_NAME).write_text(self.to_json(), encoding="utf-8")

    @staticmethod
    def read(folder: str | Path) -> "Manifest":
        """Read the manifest of ``folder``.

        Raises:
            SchemaError: no manifest there, not valid, or of another schema version.
        """
        path = Path(folder, MANIFEST_NAME)
        if not path.is_file():
            raise SchemaError(f"{folder}: no {MANIFEST_NAME}; is this a dataset that dataprep finished?")
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise SchemaError(f"{path}: not valid JSON: {error}") from error
        return Manifest.from_tree(tree, str(path))

    @staticmethod
    def from_tree(tree: Any, where: str) -> "Manifest":
        """Build a manifest from parsed JSON. ``where`` names its origin in errors."""
        version = tree.get("schema_version") if isinstance(tree, dict) else None
        if version != SCHEMA_VERSION:
            raise SchemaError(f"{where}: schema version {version}, this reader knows {SCHEMA_VERSION}; run dataprep again")
        try:
            return Manifest(**{**tree, "text": TextManifest(**tree["text"])})
        except (KeyError, TypeError) as error:
            raise SchemaError(f"{where}: not a dataset manifest: {error}") from error


def require_same(where: str, what: str, found: Any, expected: Any) -> None:
    """Raise a SchemaError in one sentence unless ``found`` equals ``expected``."""
    if found != expected:
        raise SchemaError(f"{where}: {what} is {found}, but the config asks for {expected}")
