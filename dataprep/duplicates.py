"""Near duplicates among 64-bit perceptual hashes, without comparing all pairs.

Two hashes that differ in at most n bits agree in at least one of n + 1 bands of bits (the pigeonhole principle), so only hashes
that share a band are compared. What is kept of each band lies on disk, 8 bytes a hash.
"""

import itertools

import numpy as np

from dataprep import disk

BITS = 64
MAX_DISTANCE = 8  # 9 bands of 7 bits: above it, bands are so short that nearly all pairs share one
MAX_BITS = 20  # of a bucket's number: wider bands share buckets
MIX = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio: its multiples spread over the upper bits (Knuth, volume 3, 6.4)
CHUNK = 1 << 15  # hashes in memory at a time


class _Band:
    """The positions of the hashes that were kept, by some of their bits."""

    def __init__(self, hashes: np.ndarray, low: int, high: int) -> None:
        self._low, self._mask, self._shift = low, (1 << high - low) - 1, BITS - min(high - low, MAX_BITS)
        buckets = 1 << BITS - self._shift
        counts = np.zeros(buckets, np.int64)
        for begin in range(0, len(hashes), CHUNK):
            counts += np.bincount(self.of(hashes[begin : begin + CHUNK]), minlength=buckets)
        self._begins = np.concatenate([[0], np.cumsum(counts)[:-1]])
        self._ends = self._begins.copy()
        self._slots = disk.array(len(hashes), np.int64)

    def of(self, hashes: np.ndarray) -> np.ndarray:
        """(N,) uint64 -> (N,) int64, a bucket that depends on the bits of this band alone."""
        bits = (hashes >> np.uint64(self._low)) & np.uint64(self._mask)
        return ((bits * MIX) >> np.uint64(self._shift)).astype(np.int64)

    def __getitem__(self, bucket: int) -> np.ndarray:
        return self._slots[self._begins[bucket] : self._ends[bucket]]

    def add(self, bucket: int, position: int) -> None:
        self._slots[self._ends[bucket]] = position
        self._ends[bucket] += 1


def near_duplicates(hashes: np.ndarray, sources: np.ndarray, max_distance: int) -> np.ndarray:
    """For each hash the earliest one kept before it that is near; -1 where there is none, and it is kept itself.

    Args:
        hashes: (N,) uint64.
        sources: (N,) integers. Hashes of the same source are never duplicates of each other: they are different moments.
        max_distance: bits in which duplicates may differ.

    Returns:
        (N,) int64 positions. A position that is named is kept: chains of small steps do not reach across the data set.
    """
    edges = [BITS * band // (max_distance + 1) for band in range(max_distance + 2)]
    bands = [_Band(hashes, low, high) for low, high in itertools.pairwise(edges)]
    originals = disk.array(len(hashes), np.int64, fill=-1)
    for begin in range(0, len(hashes), CHUNK):
        chunk, own = np.array(hashes[begin : begin + CHUNK]), np.array(sources[begin : begin + CHUNK])
        buckets = [band.of(chunk).tolist() for band in bands]
        for n in range(len(chunk)):
            original = -1
            for band, values in zip(bands, buckets, strict=True):
                kept = band[values[n]]
                if len(kept):
                    near = np.bitwise_count(hashes[kept] ^ chunk[n]) <= max_distance
                    near &= sources[kept] != own[n]
                    if near.any():
                        found = int(kept[near.argmax()])
                        original = found if original < 0 else min(original, found)
            if original < 0:
                for band, values in zip(bands, buckets, strict=True):
                    band.add(values[n], begin + n)
            originals[begin + n] = original
    return originals
