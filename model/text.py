"""The frozen T5 text encoder: captions -> token states. Used by dataprep (precomputed) and by samplers (prompts)."""

import hashlib
import logging
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from model.errors import UserError

logger = logging.getLogger(__name__)


class TextEncoder:
    """A frozen T5 encoder from a local path or hub name; production uses T5-11B's (width 1024, Snap Video section 3.4).

    Args:
        path: a folder with config, weights (safetensors) and sentencepiece model, or a hub name.
        max_tokens: longer captions are cut to this many tokens; the last token is then still the end token.
        device: where the encoder runs.

    Raises:
        UserError: nothing to load at ``path``.
    """

    def __init__(self, path: str, max_tokens: int, device: str | torch.device = "cpu") -> None:
        from transformers import T5EncoderModel, T5Tokenizer  # imports take seconds; only who encodes pays

        if path.startswith((".", "/", "~")) and not Path(path).expanduser().is_dir():
            raise UserError(f"text encoder: no such folder: {path}")
        source = str(Path(path).expanduser()) if path.startswith("~") else path
        try:
            # The slow class by name: AutoTokenizer picks the fast one, which assigns other ids without a hub's tokenizer.json.
            self.tokenizer = T5Tokenizer.from_pretrained(source, legacy=False)
            model = T5EncoderModel.from_pretrained(source, torch_dtype="auto", use_safetensors=True)
        except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
            told = " ".join(str(error).split())
            raise UserError(f"text encoder {path}: {told[:300]}") from error
        if not isinstance(self.tokenizer, T5Tokenizer):  # transformers returns False for a broken vocabulary
            raise UserError(f"text encoder {path}: its spiece.model is no sentencepiece model")
        if len(self.tokenizer) > model.config.vocab_size:
            found = f"{len(self.tokenizer)} tokens, its embedding {model.config.vocab_size}"
            raise UserError(f"text encoder {path}: weights and vocabulary do not belong together: the vocabulary has {found}")
        self.model = model.to(device).eval().requires_grad_(False)
        self.path = path
        self.max_tokens = max_tokens
        self.device = torch.device(device)

    @property
    def width(self) -> int:
        """D, the width of the states."""
        return int(self.model.config.d_model)

    def to(self, device: str | torch.device) -> None:
        """Move the weights."""
        self.model.to(device)
        self.device = torch.device(device)

    def num_tokens(self, caption: str) -> int:
        """L of a caption, were there no limit."""
        return len(self.tokenizer(caption, truncation=False, verbose=False).input_ids)

    @torch.no_grad()
    def encode(self, captions: list[str]) -> list[Tensor]:
        """Captions -> one (L, D) bfloat16 tensor each, on the CPU, without padding; 1 <= L <= ``max_tokens``.

        A caption's states do not depend on the others in the call: padding is masked in the encoder.
        """
        tokens = self.tokenizer(captions, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt")
        tokens = tokens.to(self.device)
        states = self.model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        lengths = tokens.attention_mask.sum(dim=1).tolist()
        return [state[:length].to("cpu", torch.bfloat16) for state, length in zip(states, lengths, strict=True)]


def revision(path: str) -> str:
    """A short content hash of a local encoder folder, so that shards and samplers can tell encoders apart.

    A hub name has no files here: it is its own revision.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return path
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(str(file.relative_to(folder)).encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def pad(states: list[Tensor], length: int) -> tuple[Tensor, Tensor]:
    """Ragged (L_i, D) states -> (B, length, D) zero-padded, and the mask (B, length), True where text is."""
    padded = states[0].new_zeros(len(states), length, states[0].shape[1])
    mask = torch.zeros(len(states), length, dtype=torch.bool)
    for row, state in enumerate(states):
        padded[row, : len(state)] = state
        mask[row, : len(state)] = True
    return padded, mask


def pack(states: Tensor) -> np.ndarray:
    """(L, D) bfloat16 -> uint16 bits, the stored form (schema column ``text``)."""
    return states.to(torch.bfloat16).contiguous().view(torch.uint16).numpy()


def unpack(bits: np.ndarray) -> Tensor:
    """uint16 bits -> (L, D) bfloat16; the inverse of ``pack``."""
    return torch.from_numpy(bits.copy()).view(torch.bfloat16)
