"""Prompts of a sampling job: from a file or another source, how often each is taken, and which are not served."""

import functools
import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from model.errors import UserError


def of_file(path: str) -> list[str]:
    """One prompt a line.

    Raises:
        UserError: not a readable text in UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts_file: {path}: {error}") from error


def blocked_by(prompt: str, blocked: Sequence[str]) -> str | None:
    """The first of the ``blocked`` words and phrases that a prompt holds: as whole words, whatever the case and the spaces."""
    said = _words(prompt)
    return next((entry for entry in blocked if (words := _words(entry)).strip() and words in said), None)


@functools.lru_cache(maxsize=1 << 14)  # a list is asked for again with each prompt
def _words(sentence: str) -> str:
    """The words alone, in lower case, each between spaces."""
    return " " + " ".join(re.findall(r"\w+", sentence.casefold())) + " "


def apportion(prompts: Sequence[str], number: int) -> list[str]:
    """``number`` prompts in the proportions of ``prompts``, evenly mixed, so that any part from the start on is alike.

    Each distinct prompt gets its share rounded down; what then lacks goes to the largest remainders, the first ones among equals.
    """
    counts = Counter(prompts)
    shares = {prompt: Fraction(count * number, len(prompts)) for prompt, count in counts.items()}
    taken = {prompt: int(share) for prompt, share in shares.items()}
    lacking = number - sum(taken.values())
    for prompt in sorted(shares, key=lambda prompt: taken[prompt] - shares[prompt])[:lacking]:
        taken[prompt] += 1
    places = [
        (Fraction(2 * k + 1, count), order, prompt)
        for order, (prompt, count) in enumerate(taken.items())
        for k in range(count)
    ]  # fmt: skip
    return [prompt for _, _, prompt in sorted(places)]
