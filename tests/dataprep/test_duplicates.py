"""Near duplicates: the same as comparing all pairs."""

import random

import numpy as np
import pytest

from dataprep.duplicates import MAX_DISTANCE, near_duplicates


def brute_force(hashes: list[int], sources: list[int], distance: int) -> list[int]:
    originals: list[int] = []
    for n, value in enumerate(hashes):
        near = [
            m for m in range(n) if originals[m] < 0 and sources[m] != sources[n] and (hashes[m] ^ value).bit_count() <= distance
        ]
        originals.append(near[0] if near else -1)
    return originals


@pytest.mark.parametrize("distance", range(MAX_DISTANCE + 1))
def test_banding_finds_what_all_pairs_find(distance: int) -> None:
    rng = random.Random(distance)
    centres = [rng.getrandbits(64) for _ in range(20)] + [0, (1 << 64) - 1]
    hashes = []
    for _ in range(300):
        value = rng.choice(centres)
        for bit in rng.sample(range(64), rng.randint(0, MAX_DISTANCE + 2)):
            value ^= 1 << bit
        hashes.append(value)
    sources = [rng.randrange(60) for _ in hashes]
    found = near_duplicates(np.array(hashes, np.uint64), np.array(sources), distance)
    assert found.tolist() == brute_force(hashes, sources, distance)
    assert (found >= 0).any() and (found < 0).any()


def test_a_source_is_no_duplicate_of_itself_and_a_chain_ends_where_it_leaves_the_first() -> None:
    same = np.array([5, 5, 5], np.uint64)
    assert near_duplicates(same, np.array([0, 0, 1]), 0).tolist() == [-1, -1, 0]
    chain = np.array([0b0000, 0b0011, 0b1111], np.uint64)  # each two bits from the one before, the ends four apart
    assert near_duplicates(chain, np.arange(3), 2).tolist() == [-1, 0, -1]


def test_nothing_is_no_duplicate() -> None:
    assert near_duplicates(np.zeros(0, np.uint64), np.zeros(0, np.int64), 3).tolist() == []
