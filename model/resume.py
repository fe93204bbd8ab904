"""Checkpoints that survive what clusters do to them. A checkpoint counts once it is whole: saved by all ranks, and sealed.

The seal is a file in the checkpoint's folder with the size and a hash of each of its files, written last. A start takes the
newest checkpoint whose seal holds. Seals guard against accidents, not against people: Composer reads checkpoints with pickle,
which can run any code, so only folders directly in the run's own ``checkpoints`` are taken, and who may write there is trusted.
"""

import fcntl
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from composer.callbacks import CheckpointSaver
from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import dist
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import set_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_into

from model.errors import UserError
from model.preemption import Preemption

SEAL = "whole.json"
NAME = re.compile(r"ep\d+-ba(\d+)")  # of a checkpoint's folder, by Composer
BLOCK = 1 << 22  # bytes

Fingerprint = list[Any]  # size in bytes, hash; as json has it


@dataclass(frozen=True)
class CheckpointConfig:
    """Sharded checkpoints under the run's folder."""

    every: int = 1000  # steps; also at the end, and when the run is told to stop
    keep: int = 3  # whole ones; the older ones are what a damaged newest falls back on

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 1:
            raise ValueError(f"every and keep must be positive, got {self.every} and {self.keep}")


@dataclass(frozen=True)
class Found:
    """What a start finds in a run's checkpoints."""

    newest: Path | None  # whole, to go on from
    ignored: dict[Path, str]  # newer ones, and why

    def __str__(self) -> str:
        told = [f"checkpoint {folder.name} is ignored: {why}" for folder, why in self.ignored.items()]
        return "\n".join([*told, f"goes on from {self.newest}" if self.newest else "no checkpoint yet: starts at the beginning"])


def find_whole(checkpoints: Path) -> Found:
    """The newest whole checkpoint in ``checkpoints``, all of its bytes read and compared with its seal. Collective.

    Raises:
        UserError: there are sealed checkpoints and all are damaged. To start over must be someone's decision.
    """
    ignored: dict[Path, str] = {}
    listed = dist.all_gather_object(_listed(checkpoints))[0]
    for folder, sealed in listed:
        fault = _fault(folder, sealed)
        if fault is None:
            return Found(folder, ignored)
        ignored[folder] = fault
    if any(sealed is not None for _, sealed in listed):
        told = "; ".join(f"{folder.name}: {why}" for folder, why in ignored.items())
        raise UserError(f"{checkpoints}: no checkpoint is whole ({told}); move the folder away to start the run over")
    return Found(None, ignored)


def require_same_parts(checkpoint: Path, model: nn.Module) -> None:
    """Refuse to go on from a checkpoint in which other parameters train, or of other shapes: there is no state for these.

    Raises:
        UserError: names one.
    """
    stored = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    average = "state.callbacks.EMA.weights."  # it is of what trains
    saved = {
        name.removeprefix(average): tuple(entry.size)
        for name, entry in stored.items()
        if name.startswith(average) and isinstance(entry, TensorStorageMetadata)
    }
    own = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    for name in sorted(saved.keys() | own.keys()):
        if saved.get(name) != own.get(name):
            was, now = (f"trains, {shape}" if (shape := of.get(name)) else "does not train" for of in (saved, own))
            told = f"{name} {was} in the checkpoint and {now} in this run"
            raise UserError(f"{checkpoint}: {told}; keep model and finetune as they were, or give the run another name")


def restore(state: State, folder: Path, callbacks: Sequence[Callback]) -> None:
    """Bring weights, optimiser and the states of ``callbacks`` back to a checkpoint's, within a run. Collective.

    All else stays: the number of the step and with it the schedule, the place in the data, the random state.
    """
    parts: dict[str, Any] = {"model": state.get_model_state_dict(), "optimizers": state.get_optim_state_dict()}
    parts["callbacks"] = {type(callback).__qualname__: callback.state_dict() for callback in callbacks}
    load_into({"state": parts}, storage_reader=FileSystemReader(folder))
    set_model_state_dict(state.model, parts["model"])
    state.load_optim_state(parts)
    for callback in callbacks:
        callback.load_state_dict(parts["callbacks"][type(callback).__qualname__])


def step_of(checkpoint: Path) -> int:
    """The optimiser steps behind a checkpoint, by its folder's name."""
    name = NAME.fullmatch(checkpoint.name)
    assert name is not None
    return int(name[1])


def seal(folder: Path) -> None:
    """Mark ``folder`` as whole, after all ranks have saved and synced their files. Collective.

    Every rank hashes the files that it wrote itself, still in its page cache.
    """
    rank = dist.get_global_rank()
    own = [*folder.glob(f"__{rank}_*.distcp"), *([folder / ".metadata"] if rank == 0 else [])]
    files: dict[str, Fingerprint] = {}
    for part in dist.all_gather_object({path.name: fingerprint(path) for path in own}):
        files |= part
    if rank == 0:
        write_seal(folder, files)
    dist.barrier()


def write_seal(folder: Path, files: dict[str, Fingerprint]) -> None:
    """Write ``files``, by name, as the seal: it is there in full or not at all, also after a loss of power."""
    partial = folder / f"{SEAL}.partial"
    with partial.open("w") as file:
        json.dump(files, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync(folder)  # the names of the files themselves, before the seal's
    partial.rename(folder / SEAL)
    _sync(folder)
    _sync(folder.parent)


def fingerprint(path: Path) -> Fingerprint:
    """Size in bytes, and XXH3-64 in hexadecimal, of a file's content."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
        return [file.tell(), digest.hexdigest()]


def prune(checkpoints: Path, newest: Path, keep: int, ignored: frozenset[Path]) -> None:
    """Delete all checkpoints but the ``keep`` newest whole ones. ``newest`` has just been sealed, so one is left in any case."""
    whole = [folder for folder, sealed in _listed(checkpoints) if sealed and folder not in ignored - {newest}]
    kept = {newest, *[folder for folder in whole if folder != newest][: keep - 1]}
    for folder, _ in _listed(checkpoints):
        if folder not in kept:
            (folder / SEAL).unlink(missing_ok=True)  # first: half a deleted checkpoint is not whole
            shutil.rmtree(folder)


def claim(run: Path, seconds: float = 120) -> int:
    """Lock a run's folder to one process as long as the returned descriptor is open, which is till the process ends.

    A predecessor that is about to end is waited for.

    Raises:
        UserError: after ``seconds`` another process still has it.
    """
    run.mkdir(parents=True, exist_ok=True)
    lock = os.open(run / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    deadline = time.monotonic() + seconds
    waiting = False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            owner = os.pread(lock, 1000, 0).decode().strip() or "another process"
            if time.monotonic() > deadline:
                raise UserError(f"{run}: {owner} is training this run; stop it, or give this one another name") from None
            if not waiting:
                print(f"{run}: waiting for {owner} to end", flush=True)
            waiting = True
            time.sleep(0.2)
    os.truncate(lock, 0)
    os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return lock


def _listed(checkpoints: Path) -> list[tuple[Path, dict[str, Fingerprint] | None]]:
    """Folders of checkpoints, the newest first, each with its seal: None without one, empty if unreadable."""
    numbered = [
        (int(name[1]), folder)
        for folder in (checkpoints.iterdir() if checkpoints.is_dir() else ())
        if (name := NAME.fullmatch(folder.name)) and folder.is_dir() and not folder.is_symlink()
    ]
    return [(folder, _read_seal(folder)) for _, folder in sorted(numbered, reverse=True)]


def _read_seal(folder: Path) -> dict[str, Fingerprint] | None:
    try:
        files = json.loads((folder / SEAL).read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return files if isinstance(files, dict) and ".metadata" in files else {}


def _fault(folder: Path, sealed: dict[str, Fingerprint] | None) -> str | None:
    """Why a checkpoint is not to be used, if so; the same on all ranks, which share the reading. Collective."""
    if sealed is None:
        return "it is not whole, its writing was cut short"
    fault = None if sealed else f"{SEAL} is damaged"
    for name in sorted(sealed, key=_by_rank)[dist.get_global_rank() :: dist.get_world_size()]:
        path = folder / name
        try:
            if path.stat().st_size != sealed[name][0]:
                fault = f"{name} has {path.stat().st_size} bytes instead of {sealed[name][0]}"
            elif fingerprint(path) != sealed[name]:
                fault = f"{name} is damaged: its hash is another"
        except OSError as error:
            fault = f"{name}: {error.strerror}"
    return next((found for found in dist.all_gather_object(fault) if found), None)


def _by_rank(name: str) -> tuple[int, str]:
    """Orders a checkpoint's files so that with the same number of processes each reads those that it wrote."""
    writer = re.match(r"__(\d+)_", name)
    return (int(writer[1]) if writer else 1 << 30, name)


def _sync(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class WholeCheckpoints(CheckpointSaver):
    """Composer's checkpoints, sealed, the newest ``keep`` kept; ends the run after one where ``preemption`` asks for it."""

    def __init__(self, folder: Path, config: CheckpointConfig, preemption: Preemption, ignored: frozenset[Path]) -> None:
        """``ignored`` are the folders that ``find_whole`` refused, to delete once there is a newer one."""
        super().__init__(
            folder=str(folder),
            latest_filename=None,  # a link to the newest, whole or not
            remote_file_name=None,
            latest_remote_file_name=None,
            save_interval=self._is_due,
        )
        self.checkpoints = folder
        self.config = config
        self.preemption = preemption
        self.ignored = ignored

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        super().batch_checkpoint(state, logger)  # returns once all ranks have saved
        step = int(state.timestamp.batch)
        if self.last_checkpoint_batch == state.timestamp.batch:
            self.saved_checkpoints.clear()  # by which Composer would delete
            folder = self.checkpoints / f"ep{int(state.timestamp.epoch)}-ba{step}"
            seal(folder)
            if dist.get_global_rank() == 0:
                prune(self.checkpoints, folder, self.config.keep, self.ignored)
            self.ignored = frozenset()
        if self.preemption.stopping:
            if dist.get_global_rank() == 0:
                by = self.preemption.told or "another rank"
                print(f"stopped by {by} after step {step}, which is saved: the same command goes on from it", flush=True)
            self.preemption.leave(f"stopped after step {step}")

    def state_dict(self) -> dict[str, Any]:
        return {}  # Composer's grows with every checkpoint; the folder itself says what there is

    def _is_due(self, state: State, event: Event) -> bool:
        if event != Event.BATCH_CHECKPOINT:
            return False
        last = state.max_duration is not None and state.timestamp >= state.max_duration
        return last or self.preemption.stopping or int(state.timestamp.batch) % self.config.every == 0
