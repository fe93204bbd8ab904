"""Files that pages show and nobody keeps: made when first wanted, under names that tell nothing, gone with the process."""

import hashlib
import re
import secrets
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

NAME = re.compile(r"[0-9a-f]{32}\.(mp4|png)")


class Scratch:
    """A temporary folder of at most so many files; those shown longest ago go first."""

    def __init__(self, limit: int = 1000) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="snapvideo-studio-")
        self._secret = secrets.token_bytes(32)  # names cannot be computed from what they stand for
        self._names: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()
        self._limit = limit

    def file(self, key: str, suffix: str, make: Callable[[Path], None]) -> Path:
        """The file for ``key``; ``make`` writes it if it is not there. One is made at a time."""
        name = hashlib.blake2b(key.encode(), digest_size=16, key=self._secret).hexdigest() + suffix
        path = Path(self._folder.name, name)
        with self._lock:
            if name not in self._names:
                make(path)
            self._names[name] = None
            self._names.move_to_end(name)
            while len(self._names) > self._limit:
                oldest, _ = self._names.popitem(last=False)
                Path(self._folder.name, oldest).unlink(missing_ok=True)
        return path

    def path(self, name: str) -> Path | None:
        """The file of that name; None if there is none, whatever the name is."""
        path = Path(self._folder.name, name)
        return path if NAME.fullmatch(name) and path.is_file() else None

    def close(self) -> None:
        """Remove everything."""
        self._folder.cleanup()
