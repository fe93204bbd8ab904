"""Three kinds of input, one list of items; nothing that lies among the inputs is lost without a reason."""

import io
import os
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataprep import ingest, limits, listing, spans
from dataprep.filters import Rejected
from dataprep.ingest import Item
from dataprep.spans import Span
from model.errors import UserError

Pairs = Callable[[Path, int], list[tuple[str, str]]]


def listed(*paths: Path) -> list[Item]:
    return list(listing.list_items([str(path) for path in paths]))


def accepted(*paths: Path) -> dict[str, str]:
    """key -> caption"""
    return {item.key: ingest.read_caption(item) for item in listed(*paths) if not item.reason}


def rejected(*paths: Path) -> dict[str, str]:
    """key -> reason"""
    return {item.key: item.reason for item in listed(*paths) if item.reason}


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    header = tarfile.TarInfo(name)
    header.size = len(data)
    tar.addfile(header, io.BytesIO(data))


def tar_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members.items():
            add(tar, name, data)
    return buffer.getvalue()


def content(item: Item) -> bytes:
    assert item.media is not None
    with spans.open_span(item.media) as file:
        return file.read()


def test_three_kinds_of_input_give_the_same_items(tmp_path: Path, write_pairs: Pairs) -> None:
    folder = tmp_path / "folder"
    pairs = write_pairs(folder, 5)
    (folder / "still.PNG").write_bytes(b"image")
    (folder / "still.json").write_text('{"text": "a still"}')
    pairs.append(("still.PNG", "a still"))
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)
    manifest = tmp_path / "manifest.parquet"
    table = {"path": [f"folder/{name}" for name, _ in pairs], "caption": [caption for _, caption in pairs]}
    pq.write_table(pa.table({**table, "key": [Path(name).stem for name, _ in pairs]}), manifest)

    expected = {Path(name).stem: caption for name, caption in pairs}
    contents = {Path(name).stem: (folder / name).read_bytes() for name, _ in pairs}
    for source in (folder, tmp_path / "set.tar", manifest):
        assert accepted(source) == expected
        assert {item.key: content(item) for item in listed(source)} == contents
        assert {item.key: item.kind for item in listed(source)} == {**dict.fromkeys(expected, "video"), "still": "image"}
        assert rejected(source) == {}


def test_a_folder_of_everything_takes_each_item_once(tmp_path: Path, write_pairs: Pairs) -> None:
    write_pairs(tmp_path / "plain" / "deep", 2)
    write_pairs(tmp_path / "listed", 2)
    table = pa.table({"path": [f"clip.{n:02d}.mp4" for n in range(2)], "caption": ["zero", "one"]})
    pq.write_table(table, tmp_path / "listed" / "manifest.parquet")
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        add(tar, "./in/tar.mp4", b"video")
        add(tar, "in/tar.txt", b"from the tar")
    assert accepted(tmp_path) == {
        "plain/deep/clip.00": "a red circle moves 0",
        "plain/deep/clip.01": "a red circle moves 1",
        "clip.00": "zero",  # relative to its manifest
        "clip.01": "one",
        "in/tar": "from the tar",
    }
    assert rejected(tmp_path) == {}


def test_what_is_no_item_has_a_reason(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4", "b.jpg", "c.txt", "d.pdf", "e.parquet", "f.tar", ".hidden.mp4"):
        (tmp_path / name).write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe.mp4")
    with (tmp_path / os.fsdecode(b"caf\xe9.mp4")).open("wb"):
        pass
    assert {item.key: item.reason for item in listed(tmp_path)} == {
        "a": "",  # its caption is missing, which is found out where it is read
        "b": "duplicate key",
        "c": "caption without media",
        "d": "not a video or image",
        "e.parquet": "not a manifest",
        str(tmp_path / "f.tar"): "broken tar",
        "caf\ufffd.mp4": "file name is not UTF-8",
    }


def test_tars_with_traps(tmp_path: Path) -> None:
    path = tmp_path / "traps.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "../../up.mp4", b"up")  # a key, never a path
        add(tar, "../../up.txt", b"climbs")
        add(tar, "far.mp4", b"far")
        add(tar, "dotted.1.mp4", b"1")
        add(tar, "dotted.1.txt", b"one")
        add(tar, "dotted.2.mp4", b"2")
        add(tar, "dotted.2.txt", b"two")
        add(tar, "far.txt", b"not adjacent")
        add(tar, "far.mp4", b"again")
        link = tarfile.TarInfo("link.mp4")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert accepted(path) == {"../../up": "climbs", "far": "not adjacent", "dotted.1": "one", "dotted.2": "two"}
    assert rejected(path) == {"far": "duplicate key"}
    assert content(next(item for item in listed(path) if item.key == "far" and not item.reason)) == b"far"


def test_the_readable_part_of_a_broken_tar_is_used(tmp_path: Path) -> None:
    path = tmp_path / "cut.tar"
    with tarfile.open(path, "w") as tar:
        for n in range(3):
            add(tar, f"{n}.mp4", b"v" * 2000)
            add(tar, f"{n}.txt", b"caption")
    path.write_bytes(path.read_bytes()[: 512 + 2048 + 512 + 512 + 512 + 700])  # within the media of the second item
    assert {item.key: item.reason for item in listed(path)} == {"0": "", "1": "", str(path): "broken tar"}


def test_manifest_rows(tmp_path: Path) -> None:
    paths = ["sub/a.mp4", None, "b.doc", "/dev/zero.mp4", "gone.mp4", "../c.png"]
    pq.write_table(pa.table({"path": paths, "caption": ["a", "x", "x", "x", None, "c"]}), tmp_path / "m.parquet")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.mp4").write_bytes(b"video")
    items = listed(tmp_path / "m.parquet")
    assert [(item.key, item.reason) for item in items] == [
        ("sub/a", ""),
        (f"{tmp_path}/m.parquet::row 1", "path missing"),
        ("b.doc", "not a video or image"),
        ("/dev/zero", ""),
        ("gone", ""),
        ("../c", ""),
    ]
    with pytest.raises(Rejected, match="caption missing"):
        ingest.read_caption(items[4])


def test_a_manifest_with_damage_behind_its_schema(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    pq.write_table(pa.table({"path": ["a.mp4"] * 9, "caption": ["a"] * 9}), path)
    data = bytearray(path.read_bytes())
    data[4:20] = b"\xff" * 16  # the header of the first page
    path.write_bytes(data)
    (tmp_path / "good.mp4").write_bytes(b"video")
    assert {item.key: item.reason for item in listed(tmp_path)} == {str(path): "broken manifest", "good": ""}


def test_a_manifest_whose_captions_are_no_text(tmp_path: Path) -> None:
    captions = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\4\0\0\0"), pa.py_buffer(b"caf\xe9")])
    pq.write_table(pa.table({"path": ["a.mp4"], "caption": captions}), tmp_path / "m.parquet")
    (tmp_path / "good.mp4").write_bytes(b"video")
    assert rejected(tmp_path) == {str(tmp_path / "m.parquet"): "broken manifest"}


def test_a_small_manifest_of_long_texts_takes_little_memory(tmp_path: Path) -> None:
    """20,000 rows share a caption of a megabyte: in the file it is there once."""
    rows = pa.array([0] * 20_000, pa.int32())
    captions = pa.DictionaryArray.from_arrays(rows, pa.array(["a very long caption " * 50_000]))
    paths = pa.array([f"{n}.mp4" for n in range(len(rows))])
    path = tmp_path / "m.parquet"
    pq.write_table(pa.table({"path": paths, "caption": captions}), path, store_schema=False)
    assert path.stat().st_size < 1_000_000
    (tmp_path / "good.mp4").write_bytes(b"video")
    with limits.memory(limits.memory_in_use() + 1024 * limits.MEGABYTE):
        reasons = Counter(item.reason for item in listing.list_items([str(tmp_path)]))
    assert reasons == {"caption too long": 20_000, "": 1}


@pytest.mark.parametrize("column", ["path", "key"])
def test_a_name_may_not_be_a_megabyte(tmp_path: Path, column: str) -> None:
    table = {"path": ["a.mp4", "b.mp4"], "caption": ["a", "b"], "key": ["a", "b"]}
    table[column][1] = "x" * 1_000_000 + ".mp4"
    pq.write_table(pa.table(table), tmp_path / "m.parquet")
    (item, refused) = listed(tmp_path / "m.parquet")
    assert (item.key, item.reason) == ("a", "")
    assert (refused.reason, len(refused.key) < 1000) == ("name too long", True)


def test_a_hostile_path_in_a_manifest_is_its_rows_end_alone(tmp_path: Path) -> None:
    paths = ["x" * 5000 + ".mp4", "nul\0.mp4", "good.mp4"]
    pq.write_table(pa.table({"path": paths, "caption": ["a"] * 3}), tmp_path / "m.parquet")
    items = listed(tmp_path / "m.parquet")
    assert [item.reason for item in items] == ["", "", ""]  # met again where they are read
    for item in items:
        assert item.media is not None
        with pytest.raises(Rejected, match="no such file|not readable"):
            spans.open_span(item.media)


@pytest.mark.parametrize(("span", "reason"), [(Span("/dev/zero"), "not readable"), (Span("/no/such"), "no such file")])
def test_only_plain_files_are_opened(span: Span, reason: str) -> None:
    with pytest.raises(Rejected) as caught:
        spans.open_span(span)
    assert caught.value.reason == reason


def test_keys_are_unique_over_all_inputs(tmp_path: Path, write_pairs: Pairs) -> None:
    write_pairs(tmp_path / "a", 3)
    write_pairs(tmp_path / "b", 4)
    items = listed(tmp_path / "a", tmp_path / "b")
    assert sorted(item.reason for item in items) == ["", "", "", "", *["duplicate key"] * 3]


def test_a_window_reads_like_a_file_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(range(200)))
    with spans.open_span(Span(str(path), 50, 100)) as file:
        assert file.read() == bytes(range(50, 150))
        assert file.read(1) == b""
        assert file.seek(-10, io.SEEK_END) == 90
        assert file.read(20) == bytes(range(140, 150))
        assert file.seek(5) == 5
        assert file.read(2) == bytes([55, 56])
        assert file.seek(3, io.SEEK_CUR) == 10
        assert file.read(1) == bytes([60])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file or folder"),
        (lambda path: path.mkdir(), "nothing to prepare"),
        (lambda path: (path.mkdir(), (path / "a.txt").write_text("x")), "nothing to prepare"),
        (lambda path: path.write_text("x"), "is none of"),
    ],
)
def test_unusable_inputs_are_the_users_error(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    path = tmp_path / "input"
    make(path)
    with pytest.raises(UserError, match=message):
        listed(path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"path": ["a"]}, "needs a column 'caption', this file has: path"),
        ({"path": [1], "caption": ["a"]}, "column 'path' must hold strings"),
    ],
)
def test_a_table_that_is_no_manifest(tmp_path: Path, columns: dict[str, list[object]], message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=message):
        listed(tmp_path / "t.parquet")


def test_the_list_survives_its_file_and_its_hash_sees_changes(tmp_path: Path, write_pairs: Pairs) -> None:
    write_pairs(tmp_path / "in", 5)
    items = listed(tmp_path / "in")
    count, first = ingest.write_items(items, tmp_path / "items.parquet", 2)
    assert count == 5
    assert [item for group in range(3) for item in ingest.read_group(tmp_path / "items.parquet", group)] == items
    assert ingest.write_items(listed(tmp_path / "in"), tmp_path / "again.parquet", 2) == (5, first)
    os.utime(tmp_path / "in" / "clip.03.mp4", (1, 1))
    assert ingest.write_items(listed(tmp_path / "in"), tmp_path / "again.parquet", 2)[1] != first


def test_tars_one_behind_the_other_in_a_file_are_all_read(tmp_path: Path) -> None:
    path = tmp_path / "cat.tar"
    parts = []
    for number in range(3):
        with tarfile.open(tmp_path / f"{number}.part", "w") as tar:
            add(tar, f"{number}.mp4", bytes([number]) * 2000)
            add(tar, f"{number}.txt", f"caption {number}".encode())
        parts.append((tmp_path / f"{number}.part").read_bytes())
    path.write_bytes(b"".join(parts))
    assert accepted(path) == {str(number): f"caption {number}" for number in range(3)}
    assert [content(item) for item in listed(path)] == [bytes([number]) * 2000 for number in range(3)]
    assert not rejected(path)
    path.write_bytes(parts[0] + parts[1] + parts[0])
    assert rejected(path) == {"0": "duplicate key"}
    path.write_bytes(parts[0] + b"what is this?".ljust(600, b"!"))  # told, and what is before it is used
    assert accepted(path) == {"0": "caption 0"}
    assert rejected(path) == {str(path): "broken tar"}
