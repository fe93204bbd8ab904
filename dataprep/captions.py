"""Captions: from the bytes of a sidecar to one clean line of text, or a reason why not."""

import json
import unicodedata

from dataprep.filters import Rejected

MAX_BYTES = 1 << 20  # of a sidecar; a larger file is no caption
MAX_CHARACTERS = 5000
MISSING = "caption missing"  # the reason for which there is none; the others say what is wrong with one
JSON_KEYS = ("caption", "text")  # the first one present counts


def from_text(raw: bytes) -> str:
    """The caption in a ``.txt`` sidecar.

    Raises:
        Rejected: not UTF-8, empty or too long.
    """
    return normalise(_decoded(raw))


def from_json(raw: bytes) -> str:
    """The caption in a ``.json`` sidecar: the string under ``caption`` or ``text``.

    Raises:
        Rejected: not UTF-8, not JSON, no such key, empty or too long.
    """
    try:
        tree = json.loads(_decoded(raw))
    except (ValueError, RecursionError) as error:
        raise Rejected("caption is not JSON", str(error)[:200]) from error
    for key in JSON_KEYS:
        if isinstance(tree, dict) and isinstance(tree.get(key), str):
            return normalise(tree[key])
    raise Rejected(MISSING, f"the JSON sidecar has no string under {' or '.join(JSON_KEYS)}")


def normalise(text: str) -> str:
    """One line in Unicode normal form C, without control characters and runs of spaces.

    Raises:
        Rejected: nothing left, too long, or lone surrogates that no UTF-8 file could hold.
    """
    if any(0xD800 <= ord(character) <= 0xDFFF for character in text):
        raise Rejected("caption is not UTF-8", "lone surrogates")
    spaced = "".join(" " if unicodedata.category(c) == "Cc" else c for c in unicodedata.normalize("NFC", text))
    caption = " ".join(spaced.split())
    if not caption:
        raise Rejected(MISSING, "empty")
    if len(caption) > MAX_CHARACTERS:
        raise Rejected("caption too long", f"{len(caption)} characters, more than {MAX_CHARACTERS}")
    return caption


def _decoded(raw: bytes) -> str:
    if len(raw) > MAX_BYTES:
        raise Rejected("caption too long", f"a sidecar of more than {MAX_BYTES} bytes")
    try:
        return raw.decode("utf-8-sig")  # some editors put a byte order mark in front
    except UnicodeDecodeError as error:
        raise Rejected("caption is not UTF-8", f"byte {error.start}") from error
