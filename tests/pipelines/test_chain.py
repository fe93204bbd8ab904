"""What a chain of commands remembers."""

import sys
from pathlib import Path

from pipelines.chain import Progress, Stage


def test_a_changed_stage_runs_again_with_all_that_follow_it(tmp_path: Path) -> None:
    script = "import sys; open(sys.argv[1], 'a').write(sys.argv[2])"

    def stages(first: str) -> str:
        progress = Progress(tmp_path, 2, "DEMO_FOLDER")
        for word in (first, "b"):
            progress.run(Stage(word, (sys.executable, "-c", script, str(tmp_path / "ran"), word)))
        return (tmp_path / "ran").read_text()

    assert stages("a") == "ab"
    assert stages("a") == "ab"
    assert stages("c") == "abcb"
    assert stages("a") == "abcbab"  # what lies in the folder is the last one's work
