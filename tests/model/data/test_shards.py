import json
from pathlib import Path

import pytest

from model.data.dataset import build_loader
from model.data.shards import find_fault, open_source
from model.errors import UserError


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (flip_a_byte, "do not have the xxh64 that the index says"),
        (cut, r"bytes long, the index says"),
        (Path.unlink, "no such file"),
    ],
)
def test_a_damaged_or_missing_shard_is_found_before_training(videos, config, damage, what: str) -> None:
    damage(videos / "shard.00006.mds")
    with pytest.raises(UserError, match=rf"shard.00006.mds: .*{what}") as error:
        build_loader(config(videos=videos), 4)
    assert "\n" not in str(error.value)
    # Processes share the work: the one whose part it is finds it.
    source = open_source(str(videos), None)
    assert [find_fault(source, part, 4, True) is not None for part in range(4)] == [False, False, True, False]
    assert (find_fault(source, 0, 1, hashes=False) is None) == (damage is flip_a_byte)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(bytes(path.stat().st_size))])
def test_a_shard_that_goes_bad_during_training_ends_it_and_is_named(videos, config, workers: int, damage) -> None:
    loader = build_loader(config(videos=videos, workers=workers), 4).dataloader
    iterator = iter(loader)
    next(iterator)
    for number in range(10):
        damage(videos / f"shard.{number:05d}.mds")
    with pytest.raises(UserError, match=r"^\S*videos/shard\.\d{5}\.mds: ") as error:
        list(iterator)
    assert "\n" not in str(error.value)


def test_one_missing_shard_does_not_shorten_the_epoch_silently(videos, config) -> None:
    loader = build_loader(config(videos=videos, workers=2), 4).dataloader
    (videos / "shard.00003.mds").unlink()
    with pytest.raises(UserError, match=r"shard\.00003\.mds"):
        list(loader)


def edited(entry: dict, **changes) -> dict:
    return {**entry, **changes}


HOSTILE = [
    (lambda e: edited(e, raw_data={**e["raw_data"], "basename": "../../../etc/passwd"}), "lies outside of the dataset's folder"),
    (lambda e: edited(e, raw_data={**e["raw_data"], "basename": "/etc/passwd"}), "lies outside of the dataset's folder"),
    (lambda e: edited(e, column_encodings=["pkl"] * 8), "does not have the columns of schema version 1"),
    (lambda e: edited(e, column_names=[f"c{n}" for n in range(8)]), "does not have the columns of schema version 1"),
    (lambda e: edited(e, format="csv"), "does not have the columns"),
    (lambda e: edited(e, compression="zstd"), "is compressed"),
    (lambda e: edited(e, samples=10**12), "cannot hold 1000000000000 samples"),
    (lambda e: edited(e, samples=-1), "cannot hold -1 samples"),
    (lambda e: edited(e, raw_data={**e["raw_data"], "hashes": {}}), "has no hash"),
    (lambda e: edited(e, raw_data=None), "not an index of MDS shards"),
    (lambda e: edited(e, samples="many"), "not an index of MDS shards"),
    (lambda e: "shard", "not an index of MDS shards"),
]


@pytest.mark.parametrize(("change", "what"), HOSTILE)
def test_indices_that_no_dataprep_wrote_are_refused(videos, config, change, what: str) -> None:
    index = json.loads((videos / "index.json").read_text())
    index["shards"][2] = change(index["shards"][2])
    (videos / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=what) as error:
        build_loader(config(videos=videos), 4)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[1, 2", '"text"', "{}", "\xff"])
def test_an_index_that_is_no_index(videos, config, text: str) -> None:
    (videos / "index.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"index\.json: "):
        build_loader(config(videos=videos), 4)
    (videos / "index.json").unlink()
    with pytest.raises(UserError, match=r"index\.json"):
        build_loader(config(videos=videos), 4)
