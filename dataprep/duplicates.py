"""Near duplicates among 64-bit hashes: those whose Hamming distance is small, found without comparing all pairs.

Two hashes that differ in at most n bits agree in at least one of n + 1 bands of bits (the pigeonhole principle), so only hashes
that share a band are compared.
"""

import itertools
from array import array

import numpy as np

BITS = 64
MAX_DISTANCE = 8  # 9 bands of 7 bits: above it, bands are so short that nearly all pairs share one


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
    masks = [(low, (1 << high - low) - 1) for low, high in itertools.pairwise(edges)]
    buckets: list[dict[int, array[int]]] = [{} for _ in masks]
    originals = np.full(len(hashes), -1, np.int64)
    for position, value in enumerate(hashes.tolist()):
        own = [(value >> shift) & mask for shift, mask in masks]
        original = -1
        for bucket, band in zip(buckets, own, strict=True):
            if band in bucket:
                kept = np.array(bucket[band])
                near = np.bitwise_count(hashes[kept] ^ np.uint64(value)) <= max_distance
                near &= sources[kept] != sources[position]
                if near.any():
                    found = int(kept[near.argmax()])
                    original = found if original < 0 else min(original, found)
        if original < 0:
            for bucket, band in zip(buckets, own, strict=True):
                bucket.setdefault(band, array("q")).append(position)
        originals[position] = original
    return originals
