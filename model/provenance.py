"""Which code made an artefact or a dataset. Standard library only."""

import subprocess
from pathlib import Path


def git_commit() -> str:
    """Commit of the running code; "unknown" outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
