import dataclasses
import itertools
import json
import mmap
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from composer import Trainer
from composer.core import Callback
from composer.models import ComposerModel
from composer.utils import reproducibility

from model.data.dataset import Mixture, build_loader, manifests, mixture
from model.errors import UserError

VIDEOS, IMAGES = 37, 11


@pytest.fixture
def both(tmp_path, write_dataset, config):
    """A config with 37 videos in 10 shards and 11 images."""
    videos = write_dataset(tmp_path / "videos", "videos", VIDEOS)
    images = write_dataset(tmp_path / "images", "images", IMAGES)
    return config(videos=videos, images=images)


def content(packed) -> tuple:
    """All of a batch, comparable."""
    tensors = {name: value for name, value in packed.items() if isinstance(value, torch.Tensor)}
    return tuple(packed["key"]), tuple(packed["caption"]), *((name, value.tolist()) for name, value in tensors.items())


def epoch(loader) -> list[tuple]:
    return [content(packed) for packed in loader]


def keys(batches: list[tuple]) -> list[str]:
    return [key for packed in batches for key in packed[0]]


@pytest.mark.parametrize(
    ("videos", "images", "slots"),
    [(2, 2, "vivi"), (3, 1, "vvvi"), (1, 3, "viii"), (5, 2, "vvvivvi"), (3, 0, "vvv"), (0, 2, "ii")],
)
def test_slots_alternate_evenly(videos: int, images: int, slots: str) -> None:
    mix = Mixture(videos, images)
    assert "".join(kind[0] for kind in mix.slots) == slots
    for start in range(mix.size):  # any part of a batch has the batch's share of images, within one
        for stop in range(start + 1, mix.size + 1):
            share = (stop - start) * images / mix.size
            assert abs(mix.slots[start:stop].count("images") - share) < 1


def test_a_share_that_is_no_whole_number_names_the_numbers(config) -> None:
    given = config(videos="v", images="i", image_share=0.3)
    assert mixture(given, 20, 2) == Mixture(7, 3)
    with pytest.raises(UserError, match=r"0\.3 makes 3\.6 images in a .* of 12 \(global batch 24 over 2 processes\)"):
        mixture(given, 24, 2)
    with pytest.raises(UserError, match="global batch of 25 does not split evenly over 2 processes"):
        mixture(given, 25, 2)
    for share in (0.0, 1.0, -1.0, 2.0):
        with pytest.raises(UserError, match="whole number from 1 to 9"):
            mixture(dataclasses.replace(given, image_share=share), 20, 2)


def test_an_epoch_is_one_pass_over_the_videos_and_images_fill_it(both) -> None:
    spec = build_loader(both, 8)
    epochs = [epoch(spec.dataloader) for _ in range(3)]
    assert len(spec.dataloader) == VIDEOS // 4
    assert spec.num_samples == 8 * (VIDEOS // 4)
    for batches in epochs:
        assert len(batches) == VIDEOS // 4
        for packed in batches:
            assert [key.split("-")[0] for key in packed[0]] == ["videos", "images"] * 4
        seen = Counter(keys(batches))
        assert {seen[key] for key in seen if key.startswith("videos")} == {1}
        assert sum(count for key, count in seen.items() if key.startswith("videos")) == 36
        images = [seen[f"images-{number}"] for number in range(IMAGES)]
        assert sum(images) == 36
        assert max(images) - min(images) <= 1
    assert len({tuple(keys(batches)) for batches in epochs}) == 3  # another order each time
    # Whatever the remainder leaves out differs too.
    assert len(set.intersection(*(set(keys(batches)) for batches in epochs))) > VIDEOS - 3 + IMAGES - 1


def test_the_order_goes_across_shards(both, tmp_path) -> None:
    shards = json.loads((tmp_path / "videos" / "index.json").read_text())["shards"]
    assert len(shards) == 10
    shard_of = [number for number, shard in enumerate(shards) for _ in range(shard["samples"])]
    order = [shard_of[int(key.split("-")[1])] for key in keys(epoch(build_loader(both, 8).dataloader)) if key.startswith("v")]
    neighbours = sum(a == b for a, b in itertools.pairwise(order))
    assert neighbours < len(order) // 2  # in shard order it would be about 26 of 35, in a random one about 3


@pytest.mark.parametrize(("kind", "count"), [("videos", 9), ("images", 3)])
def test_one_kind_alone(tmp_path, write_dataset, config, kind: str, count: int) -> None:
    spec = build_loader(config(**{kind: write_dataset(tmp_path / kind, kind, 4 * count + 1)}), 4)
    batches = list(spec.dataloader)
    assert len(batches) == count
    assert len({key for packed in batches for key in packed["key"]}) == 4 * count
    video = spec.microbatch_transforms(spec.split_batch(batches[0], 2)[1])["video"]
    assert video.shape == (2, 4, 3, 6, 10)


def test_what_a_sample_shows_depends_on_seed_epoch_and_sample_alone(both) -> None:
    expected = None
    for workers in (0, 1, 2):
        loader = build_loader(dataclasses.replace(both, workers=workers), 8).dataloader
        epochs = [epoch(loader), epoch(loader)]
        expected = expected or epochs
        assert epochs == expected
    assert expected[0] != epoch(build_loader(dataclasses.replace(both, seed=1), 8).dataloader)
    # The same video shows other windows in other epochs; noise seeds never repeat.
    loader = build_loader(both, 8).dataloader
    shown, seeds = {}, []
    for _ in range(6):
        for packed in loader:
            seeds += packed["seed"]
            clips = [key for key in packed["key"] if key.startswith("videos")]
            for key, frames in zip(clips, packed["videos"], strict=True):
                shown.setdefault(key, set()).add(tuple(frames[:, 0, 0, 1].tolist()))
    assert len(set(seeds)) == len(seeds)
    assert min(len(windows) for windows in shown.values() if len(windows)) >= 2


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("done", "at"), [(0, 0), (0, 1), (0, 5), (1, 0), (2, 3), (1, 9)])
def test_resume_goes_on_where_training_was(both, workers: int, done: int, at: int) -> None:
    given = dataclasses.replace(both, workers=workers)
    loader = build_loader(given, 8).dataloader
    for _ in range(done):
        epoch(loader)
    iterator = iter(loader)
    for _ in range(at):
        next(iterator)
    state = json.loads(json.dumps(loader.dataset.state_dict(at * 8, True)))
    expected = [content(packed) for packed in iterator] + epoch(loader)
    # With other loader processes than before, and twice in a row.
    resumed = build_loader(dataclasses.replace(given, workers=1), 8).dataloader
    resumed.dataset.load_state_dict(state)
    assert resumed.dataset.state_dict(at * 8, True) == state
    rest = epoch(resumed)
    assert len(rest) == 9 - at
    assert rest + epoch(resumed) == expected


def test_a_checkpoint_of_another_order_is_refused(both) -> None:
    state = build_loader(both, 8).dataloader.dataset.state_dict(0, True)
    for change, what in [
        ({"seed": 3}, "data seed is 0, this run's 3"),
        ({"images": None}, "share of images is 0.5, this run's 0.0"),
    ]:
        with pytest.raises(UserError, match=what):
            build_loader(dataclasses.replace(both, **change), 8).dataloader.dataset.load_state_dict(state)
    with pytest.raises(UserError, match="global batch size is 8, this run's 4"):
        build_loader(both, 4).dataloader.dataset.load_state_dict(state)


def prefixes(loader) -> list[int]:
    """The names in shared memory that the loader's streams took, in their order."""
    return [part._shm_prefix_int for part in loader.dataset.parts.values()]


def test_a_position_left_in_shared_memory_by_a_killed_run_is_not_taken_up(both) -> None:
    first = build_loader(both, 8).dataloader  # stays alive, and with it the names that it took
    expected = epoch(first)
    position = {"epoch": 5, "sample_in_epoch": 16, "num_canonical_nodes": 1, "shuffle_seed": 7, "initial_physical_nodes": 1}
    for _ in range(10):  # other runs on this machine may take the names first
        probe = build_loader(both, 8).dataloader
        free = max(prefixes(probe)) + 1
        # Another run, with its own folder for temporary files, holds the next name; behind it lies what a killed one left.
        locals_ = b"/elsewhere\0" + str(free).encode()
        left = {f"{free:06}_locals": (4 + len(locals_)).to_bytes(4, "little") + locals_}
        left |= {f"{number:06}_resume": json.dumps(position).encode() for number in (free + 1, free + 2)}
        paths = [Path("/dev/shm", name) for name in left]
        if any(path.exists() for path in paths):
            continue
        try:
            for path, data in zip(paths, left.values(), strict=True):
                path.write_bytes(data.ljust(mmap.PAGESIZE, b"\0"))
            fresh = build_loader(both, 8).dataloader
            if prefixes(fresh) == [free + 1, free + 2]:  # it is where those lie
                assert epoch(fresh) == expected
                return
        finally:
            for path in paths:
                path.unlink(missing_ok=True)
    pytest.fail("the loader never met what was left for it")


def attached() -> Counter[str]:
    """How often this process holds each name of shared memory open."""
    links = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return Counter(link.removesuffix(" (deleted)") for link in links if link.startswith("/dev/shm/"))


def test_a_loader_does_not_hold_the_shared_memory_of_others_open(both) -> None:
    """Looking for free names attaches to all that are taken: with what killed runs left, files would run out."""
    first = build_loader(both, 8).dataloader
    held = attached()
    second = build_loader(both, 8).dataloader
    assert not set(prefixes(first)) & set(prefixes(second))
    assert {name: count for name, count in attached().items() if name in held} == held


class Probe(ComposerModel):
    """One weight; the loss depends on the data and on the generator."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Linear(1, 1, bias=False)
        self.seen: list[tuple] = []

    def forward(self, given):
        self.seen.append((tuple(given["key"]), given["video"].shape, given["is_image"].tolist()))
        signal = given["video"].mean(dim=(1, 2, 3, 4)) + torch.rand(len(given["key"]))
        return self.weight(signal[:, None])

    def loss(self, outputs, given):
        return (outputs**2).mean()


class Record(Callback):
    def __init__(self) -> None:
        self.keys: list[tuple] = []

    def batch_end(self, state, logger) -> None:
        self.keys.append(tuple(state.batch["key"]))


def train(config, folder: Path, duration: str, **options) -> tuple[Probe, Record, Trainer]:
    torch.manual_seed(0)
    model, record = Probe(), Record()
    trainer = Trainer(
        model=model,
        train_dataloader=build_loader(config, 8),
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        max_duration=duration,
        device_train_microbatch_size=4,
        device="cpu",
        seed=1,
        callbacks=record,
        run_name="run",
        save_folder=str(folder),
        save_interval=options.pop("save_interval", "1ep"),
        progress_bar=False,
        **options,
    )
    if trainer._rng_state is not None:  # Composer restores it itself only for data sets that do not know their position
        reproducibility.load_rng_state(trainer._rng_state)
    trainer.fit()
    return model, record, trainer


@pytest.mark.parametrize("interval", ["1ep", "4ba"])
def test_composer_trains_microbatches_and_resumes_exactly(both, tmp_path, interval: str) -> None:
    given = dataclasses.replace(both, workers=1)
    whole_model, whole, trainer = train(given, tmp_path / "whole", "3ep")
    assert len(whole.keys) == 27
    assert int(trainer.state.timestamp.sample) == 27 * 8
    for key, shape, is_image in whole_model.seen:
        assert (len(key), *shape) == (4, 4, 4, 3, 6, 10)
        assert is_image == [False, True, False, True]  # each microbatch has its share
    stop = {"1ep": "2ep", "4ba": "13ba"}[interval]
    train(given, tmp_path / interval, stop, save_interval=interval)
    latest = {"1ep": 18, "4ba": 12}[interval]
    if interval == "4ba":  # as if it had died behind the checkpoint of batch 12, the third batch of the second epoch
        for file in (tmp_path / interval).glob("*ba13*"):
            file.unlink()
    checkpoint = next((tmp_path / interval).glob(f"*ba{latest}*"))
    model, rest, _ = train(given, tmp_path / "rest", "3ep", load_path=str(checkpoint))
    assert rest.keys == whole.keys[latest:]
    assert model.weight.weight.item() == whole_model.weight.weight.item()


def run_two_processes(folder: Path, config, global_batch: int) -> list[dict]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir()
    processes = []
    for rank in range(2):
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "NODE_RANK": 0}
        world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": Path(__file__).parents[3]}
        script = Path(__file__).with_name("two_processes.py")
        command = [sys.executable, str(script), str(folder), json.dumps(dataclasses.asdict(config)), str(global_batch)]
        environment = {**os.environ, **{name: str(value) for name, value in world.items()}}
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_two_processes_see_exact_shares_and_the_same_global_batches_as_one(both, tmp_path) -> None:
    given = dataclasses.replace(both, workers=1, canonical_nodes=2)
    ranks = run_two_processes(tmp_path / "out", given, 8)
    one = build_loader(given, 8).dataloader
    expected = [sorted(zip(b["key"], b["frame_rate"].tolist(), b["seed"], strict=True)) for b in one]
    for part in ("whole", "resumed"):
        assert all(b["is_image"] == [False, True, False, True] for rank in ranks for b in rank[part])
    merged = [
        sorted(entry for b in batches for entry in zip(b["key"], b["rate"], b["seed"], strict=True))
        for batches in zip(ranks[0]["whole"], ranks[1]["whole"], strict=True)
    ]
    assert merged == expected
    assert [rank["resumed"] for rank in ranks] == [rank["whole"][2:] for rank in ranks]
    # From two processes to one.
    resumed = build_loader(dataclasses.replace(given, workers=0), 8).dataloader
    resumed.dataset.load_state_dict(ranks[0]["state"])
    rest = [sorted(zip(b["key"], b["frame_rate"].tolist(), b["seed"], strict=True)) for b in resumed]
    assert rest == expected[2:]


def test_manifests_are_those_of_the_folders(both) -> None:
    found = manifests(both)
    assert list(found) == ["videos", "images"]
    assert (found["videos"].num_samples, found["images"].num_samples) == (VIDEOS, IMAGES)


MISMATCHES = [
    ({"height": 12}, {}, "videos: frame height is 12, but the config asks for 6"),
    ({"width": 12}, {}, "videos: frame width is 12, but the config asks for 10"),
    ({"kind": "images"}, {}, "kind of dataset is images, but the config asks for videos"),
    ({"schema_version": 9}, {}, "schema version 9, this reader knows 1"),
    ({"frame_rate": 25.0}, {}, "its 25 frames per second cannot be seen at 24"),
    ({}, {"frame_rates": (24.0, 9.0)}, "its 24 frames per second cannot be seen at 9"),
    ({}, {"frame_rates": ()}, "names no frame rates"),
    ({}, {"frames": 11}, "clips have at most 10 frames, but the config needs 11 or more"),
    ({}, {"text_width": 8}, "width of the text states is 4, but the config asks for 8"),
    ({}, {"max_tokens": 8}, "limit of text tokens is 5, but the config asks for 8"),
    ({}, {"text_revision": "r2"}, "text encoder revision is r1, but the config asks for r2"),
    ({"num_samples": 36}, {}, "the index holds 37 samples, the manifest 36"),
    ({"frame_format": "png"}, {}, "frame_format"),
    ({"max_frames": "ten"}, {}, "max_frames"),
]


@pytest.mark.parametrize(("stored", "asked", "what"), MISMATCHES)
def test_data_of_another_kind_than_the_config_asks_for(tmp_path, write_dataset, config, stored, asked, what: str) -> None:
    folder = write_dataset(tmp_path / "videos", "videos", VIDEOS)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **stored}))
    with pytest.raises(UserError, match=what) as error:
        build_loader(config(videos=folder, **asked), 8)
    assert "\n" not in str(error.value)


def test_images_and_videos_of_different_encoders(both, tmp_path) -> None:
    file = tmp_path / "images" / "manifest.json"
    file.write_text(file.read_text().replace('"r1"', '"r2"'))
    with pytest.raises(UserError, match="different text encoders"):
        build_loader(both, 8)


def test_nothing_to_read(config, tmp_path, both) -> None:
    for given, what in [
        (config(), "nothing to train on"),
        (config(videos=tmp_path / "none"), "no such dataset folder: .*none"),
        (config(images=tmp_path), "no manifest.json; is this a dataset that dataprep finished"),
        (config(videos="s3://bucket/videos"), "s3://bucket/videos is remote: name a folder"),
        (dataclasses.replace(both, image_share=0.25), "holds 37 samples, a global batch takes 48"),
    ]:
        with pytest.raises(UserError, match=what):
            build_loader(given, 64)
