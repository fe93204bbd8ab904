"""What the studio's tests share: shards with hostile captions, two sampling jobs, and the application on a port of its own."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from streaming import MDSWriter

from dataprep import shards
from dataprep.shards import Account
from model import media
from model.data.schema import COLUMNS, Manifest, TextManifest
from pipelines.studio import server
from pipelines.studio.state import Studio, StudioConfig

# Would change the page's title if a browser ever ran it, in each of the ways that a page of Gradio's could.
RUN = "document.title='broken'"
HOSTILE = f'<img src=x onerror="{RUN}"> ${{{RUN}}} {{{{value}}}} <script>{RUN}</script>'
TEXT = TextManifest("t5", "revision", 4, "bfloat16", 8)


def write_shards(root: Path, videos: int = 20) -> Path:
    """The output of a data preparation: videos and images of 12x16 pixels, and tables of what was not kept."""
    rng = np.random.default_rng(0)
    for kind, count, frames in (("videos", videos, 6), ("images", 3, 1)):
        folder = root / "stage1" / kind
        with MDSWriter(columns=COLUMNS, out=str(folder), hashes=["xxh64"], size_limit=4000) as writer:
            for n in range(count):
                pixels = rng.integers(0, 256, (frames, 12, 16, 3), dtype=np.uint8)
                writer.write(
                    {
                        "key": f"item{n}:0",
                        "caption": HOSTILE if n == 1 else f"{'a red circle' if n % 2 else 'a blue square'} number {n}",
                        "frames": pixels.tobytes(),
                        "frame_ends": np.arange(1, frames + 1, dtype=np.uint32) * pixels[0].size,
                        "start_seconds": 1.5 * n,
                        "source_height": 120,
                        "source_width": 160,
                        "text": np.zeros((2, 4), np.uint16),
                    }
                )
        manifest = Manifest("videos", 12, 16, 12.0, 8, "raw", count, TEXT)  # type: ignore[arg-type]
        still = replace(manifest, kind="images", frame_rate=0.0, max_frames=1)
        (still if kind == "images" else manifest).write(folder)
    lost = [Account(f"lost{n}", "video", f"lost{n}.mp4", "rejected", "truncated", HOSTILE) for n in range(60)]
    lost.append(Account("dim", "video", "dim.mp4", "filtered", "dark", "0.01"))
    shards.write_rows(root / shards.REJECTS_NAME, lost, shards.ACCOUNT_SCHEMA)
    return root


def write_job(folder: Path, prompts: list[str], value: int) -> Path:
    """What ``pipelines.sample`` leaves: clips of one grey, whose files say who made them, and samples.json."""
    folder.mkdir(parents=True)
    listed = []
    for n, prompt in enumerate(prompts):
        frames = torch.full((4, 12, 16, 3), value + n, dtype=torch.uint8)
        media.write_mp4(folder / f"{n:03d}.mp4", frames, 8.0, {"title": prompt, "comment": f"made by {folder.name}"})
        listed.append({"file": f"{n:03d}.mp4", "prompt": prompt, "seed": n})
    (folder / "samples.json").write_text(json.dumps({"clips": listed}))
    return folder


@contextlib.contextmanager
def running(c: StudioConfig) -> Iterator[str]:
    """The studio's server, in threads of this process; gives its address."""
    studio = Studio(c)
    app = server.server(studio)
    thread = threading.Thread(target=app.run, daemon=True)
    thread.start()
    try:
        while not app.started:
            assert thread.is_alive()
            time.sleep(0.02)
        yield f"http://{c.host}:{app.servers[0].sockets[0].getsockname()[1]}"
    finally:
        app.should_exit = True
        thread.join()
        studio.close()
