"""What ``bench/gpu.py`` has measured so far: a file of one JSON object a line, written row by row, so that nothing is lost."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Record:
    """Rows of measurements of one part, kept in a file; a row that is there is not measured again.

    A row's key says what was measured (strings and numbers), its values what came out.
    """

    def __init__(self, path: Path) -> None:
        """Read what ``path`` holds, if it exists. A last line that a kill cut short is dropped."""
        self.path = path
        self.rows: list[dict[str, Any]] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            try:
                self.rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        self._rewrite()

    def find(self, **key: Any) -> dict[str, Any] | None:
        """The row with exactly this key, or None."""
        return next((row for row in self.rows if row["key"] == key), None)

    def add(self, key: Mapping[str, Any], **values: Any) -> dict[str, Any]:
        """Keep a row, in the file at once, print it and return it."""
        row = {"key": dict(key), **values}
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        named = " ".join(map(str, key.values()))
        print(f"  {named}: " + ", ".join(f"{name} {_short(value)}" for name, value in values.items()), flush=True)
        return row

    def clear(self) -> None:
        """Forget all rows."""
        self.rows = []
        self._rewrite()

    def _rewrite(self) -> None:
        """In one go, so that a kill leaves either the old file or the new one."""
        fresh = self.path.with_suffix(".new")
        fresh.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        fresh.replace(self.path)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
