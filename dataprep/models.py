"""Models of transformers that dataprep runs: which one lies at a path, and where it runs."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from model.errors import UserError


def revision(key: str, path: str) -> str:
    """A hash of the files of the model that ``key`` of the config names, or its hub name.

    Raises:
        UserError: no such folder, or not of a model.
    """
    folder = Path(path).expanduser()
    is_hub_name = path.count("/") <= 1 and not path.startswith((".", "/", "~"))
    if not folder.is_dir() and not is_hub_name:
        raise UserError(f"{key}: no such folder: {path}")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"{key}: {path} holds no config.json; is it a model of transformers?")
    from model import text  # brings in torch, which only this and the workers need

    return text.revision(path)


def absolute(path: str) -> str:
    """The same for processes that run elsewhere; a hub name stays."""
    folder = Path(path).expanduser()
    return str(folder.absolute()) if folder.is_dir() else path


@contextlib.contextmanager
def loading(key: str, path: str) -> Iterator[None]:
    """Turn what transformers raises for a bad model into one line."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{key} {path}: {' '.join(str(error).split())[:300]}") from error


def worker_device() -> str:
    """One of the executor's GPUs, else the CPU on one thread: Spark runs one task per core."""
    import torch

    if torch.cuda.is_available():
        return f"cuda:{os.getpid() % torch.cuda.device_count()}"
    torch.set_num_threads(1)
    return "cpu"
