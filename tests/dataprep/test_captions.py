"""Captions: what comes out clean, and what is refused with which reason."""

import json

import pytest

from dataprep import captions
from dataprep.filters import Rejected


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"a red circle\n", "a red circle"),
        (b"\xef\xbb\xbfmarked", "marked"),  # byte order mark
        (b"  two\r\nlines\tand\x00control ", "two lines and control"),
        ("e\u0301te\u0301".encode(), "\u00e9t\u00e9"),  # combining accents become one character each
        ("\u8d64\u3044\u5186".encode(), "\u8d64\u3044\u5186"),
    ],
)
def test_text_becomes_one_clean_line(raw: bytes, expected: str) -> None:
    assert captions.from_text(raw) == expected


@pytest.mark.parametrize("key", ["caption", "text"])
def test_json_sidecar(key: str) -> None:
    assert captions.from_json(json.dumps({key: " a  cat ", "other": 1}).encode()) == "a cat"


@pytest.mark.parametrize(
    ("read", "raw", "reason"),
    [
        (captions.from_text, b"caf\xe9", "caption is not UTF-8"),
        (captions.from_text, b" \n\t", "caption missing"),
        (captions.from_text, b"", "caption missing"),
        (captions.from_text, b"x" * (captions.MAX_CHARACTERS + 1), "caption too long"),
        (captions.from_text, b"x" * (captions.MAX_BYTES + 1), "caption too long"),
        (captions.from_json, b"{", "caption is not JSON"),
        (captions.from_json, b"[" * 100_000, "caption is not JSON"),
        (captions.from_json, b"\xff{}", "caption is not UTF-8"),
        (captions.from_json, b'["a cat"]', "caption missing"),
        (captions.from_json, b'{"caption": 7}', "caption missing"),
        (captions.from_json, b'{"caption": "\\ud800"}', "caption is not UTF-8"),
    ],
)
def test_bad_captions_are_refused(read: object, raw: bytes, reason: str) -> None:
    with pytest.raises(Rejected) as caught:
        read(raw)  # type: ignore[operator]
    assert caught.value.reason == reason
