"""The folder that a job leaves, and its work folder beside it: one job at a time, and an output that changes by one rename.

OUTPUT                  what readers see; always whole
OUTPUT.tmp-HASH/        the work folder (dataprep/shards.py), named after what the job is to produce
.OUTPUT.lock            held by the job that runs
.OUTPUT.list-*/         its list of inputs while it is being made
"""

import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dataprep import shards
from dataprep.shards import Outcome
from model.errors import UserError

WORKSPACE = "workspace"  # in job.json: the name of the work folder that it was made in
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


@dataclasses.dataclass(frozen=True)
class Made:
    """What made an output."""

    digest: str  # of config (but for select), inputs and text encoder
    recipe: str  # of these without the inputs: what is decoded under the same one can be used again
    select: dict[str, Any] | None
    outcome: Outcome | None  # None: made before there was a selection
    fetch: dict[str, Any] | None  # what could be had
    pool: str  # a hash of what the pool holds; empty where it is gone


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Keep other jobs from ``output``; the lock goes with the process.

    Raises:
        UserError: another job is writing there.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    path = output.with_name(f".{output.name}.lock")
    while True:
        lock = path.open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.close()
            raise UserError(f"another dataprep job is writing to {output}") from error
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(lock.fileno()).st_ino:
                break
        lock.close()  # a job that just ended has removed the file: this is not the one that others will see
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.close()


def workspace_of(output: Path, *identity: str | int) -> Path:
    """The work folder of a job with this ``identity``, on the file system of its output."""
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    return output.with_name(f"{output.name}.tmp-{digest[:16]}")


def describe(output: Path) -> Made | None:
    """What made ``output``; None if nothing is there.

    Raises:
        UserError: something is there that dataprep did not write.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    try:
        job = json.loads((output / shards.JOB_NAME).read_text(encoding="utf-8"))
        outcome = Outcome(**job["outcome"]) if "select" in job else None
        index = output / shards.POOL_NAME / shards.SHARDS_NAME
        with index.open("rb") if index.is_file() else contextlib.nullcontext() as file:
            pool = hashlib.file_digest(file, "sha256").hexdigest() if file else ""
        fetch = job.get("config", {}).get("fetch")
        return Made(str(job["digest"]), str(job.get("recipe", "")), job.get("select"), outcome, fetch, pool)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"output: {output} exists and was not written by dataprep; choose another folder") from error


def recover(output: Path) -> None:
    """Put right what a killed job left around ``output``; to be called under its lock. Work folders to go on from stay."""
    name = glob.escape(output.name)
    for listing in output.parent.glob(f".{name}.list-*"):
        shutil.rmtree(listing, ignore_errors=True)
    for workspace in output.parent.glob(f"{name}.tmp-*"):
        replaced = workspace / "replaced"
        if replaced.exists() and not output.exists():  # killed between two renames
            replaced.rename(output)
        elif replaced.exists() or _made_in(output) == workspace.name:  # done, and not yet cleared away
            shutil.rmtree(workspace, ignore_errors=True)


def swap_in(workspace: Path, output: Path) -> None:
    """Make ``finished`` the output, in place of what was there: by one rename where the system can. The work folder goes."""
    finished, replaced = workspace / "finished", workspace / "replaced"
    if not output.exists():
        finished.rename(output)
    elif not _exchange(finished, output):
        shutil.rmtree(replaced, ignore_errors=True)
        output.rename(replaced)
        finished.rename(output)
    shutil.rmtree(workspace, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Let two paths swap what they name, at once. False where the system cannot: NFS, some older kernels."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(second))


def _made_in(output: Path) -> str | None:
    """Name of the work folder in which a finished output was made; None if that is not known."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        name = json.loads((output / shards.JOB_NAME).read_text(encoding="utf-8")).get(WORKSPACE)
        return str(name) if name else None
    return None
