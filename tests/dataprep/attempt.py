"""``python attempt.py FOLDER OUT``: prepare every item under FOLDER as a Spark task does, one after the other in this process.

Before each item its key is printed, after it a line of JSON: what became of it, its cost, and the memory this process has needed
so far. The frames go to OUT/NUMBER.npy as (T, H, W, 3) uint8.
"""

import json
import re
import sys
import time
from pathlib import Path

import av
import numpy as np

from dataprep import ingest, limits, listing, partition
from dataprep.clips import ClipConfig
from dataprep.encode import StageConfig, TextConfig
from dataprep.filters import FilterConfig, Rejected
from dataprep.partition import Recipe

STAGE = StageConfig("only", 72, 128, "raw")
RECIPE = Recipe(
    stages=(STAGE,),
    clips=ClipConfig(frame_rate=24, clip_frames=1000, min_frames=12, max_clips_per_video=1, split_at_cuts=False),
    text=TextConfig("none", 8),
    filters=FilterConfig(max_gigapixels=0.5),
)


def main(folder: str, out: str) -> None:
    av.logging.set_level(av.logging.PANIC)
    most = limits.memory_in_use() + RECIPE.filters.max_memory_mb * limits.MEGABYTE
    for number, item in enumerate(listing.list_items([folder])):
        print(json.dumps(item.key), flush=True)
        begin, frames, told = time.process_time(), 0, {"reason": item.reason, "detail": item.detail, "caption": ""}
        try:
            if not item.reason:
                told["caption"] = ingest.read_caption(item)
                packed = partition.prepare_guarded(item, RECIPE, most, careful=False).clips[0].stages[0]
                images = np.frombuffer(packed.frames, np.uint8).reshape(-1, STAGE.height, STAGE.width, 3)
                np.save(Path(out, str(number)), images)
                frames = len(images)
        except Rejected as rejected:
            told.update(reason=rejected.reason, detail=rejected.detail)
        except Exception as error:  # what the worker turns into the row "failed"; here it is a finding
            told.update(reason="failed", detail=f"{type(error).__name__}: {error}")
        seconds, megabytes = time.process_time() - begin, most_resident()
        print(json.dumps({**told, "frames": frames, "number": number, "seconds": seconds, "megabytes": megabytes}), flush=True)


def most_resident() -> float:
    """Megabytes of this program; resource usage would count what its parent had when it forked."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


if __name__ == "__main__":
    main(*sys.argv[1:])
