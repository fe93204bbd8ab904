"""A training step and a sampling step, in this checkout against another: ``python bench/steps.py --against DIR [yaml ...]``.

For changes of the networks: does anything get slower? Each checkout runs in a process of its own on the same batches, on one
core, and they take turns step by step, so that a slow minute hits both; medians and their ratio are reported. Without
``--against`` this checkout is timed alone. To compare with an earlier commit: ``git worktree add ../before COMMIT``.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
YAMLS = ["yamls/demo/stage1.yaml", "yamls/learn/stage1.yaml", "yamls/learn/stage2.yaml", "yamls/learn/unet.yaml"]
TEXT_TOKENS = 16


def steps_of(yaml: str, videos: int) -> dict[str, Callable[[], Any]]:
    """A training step up to the gradients, and an evaluation of D, with the model of a yaml and a batch of noise."""
    import torch

    from model import config
    from model.denoiser import Denoiser
    from model.networks.conditioning import Conditioning
    from model.train import TrainConfig

    c = config.load(TrainConfig, ROOT / yaml)
    torch.manual_seed(0)
    denoiser, (frames, height, width) = Denoiser(c.model), c.model.network.size
    batch: dict[str, Any] = {
        "video": torch.empty(videos, frames, 3, c.model.codec.height, c.model.codec.width).uniform_(-1, 1),
        "text": torch.randn(videos, TEXT_TOKENS, c.data.text_width),
        "text_mask": torch.ones(videos, TEXT_TOKENS, dtype=torch.bool),
        "frame_rate": torch.full((videos,), 8.0),
        "resolution": torch.full((videos, 2), 64.0),
        "seed": list(range(videos)),
    }
    noisy, sigma = torch.randn(videos, frames, 3, height, width), torch.ones(videos)
    low, none = (torch.zeros_like(noisy), torch.zeros(videos)) if c.model.upsampler else (None, None)
    told = Conditioning(sigma, batch["text"], batch["text_mask"], batch["frame_rate"], batch["resolution"], low, none)

    def train() -> None:
        denoiser.train()
        denoiser.loss(denoiser(batch), batch).backward()
        denoiser.zero_grad(set_to_none=True)

    def sample() -> None:
        denoiser.eval()
        with torch.no_grad():
            denoiser.denoise(noisy, sigma, told, None)

    return {"training": train, "sampling": sample}


def work(yamls: Sequence[str], videos: int) -> None:
    """The process of one checkout: for each line that comes in, run the step that it names and answer with its seconds."""
    import torch

    import model
    from bench.timing import seconds

    torch.set_num_threads(1)
    steps = {(yaml, kind): step for yaml in yamls for kind, step in steps_of(yaml, videos).items()}
    print(Path(model.__path__[0]).parent, flush=True)
    for line in sys.stdin:
        yaml, kind = line.split()
        print(seconds(steps[yaml, kind], torch.device("cpu")), flush=True)


class Checkout:
    """A checkout at work."""

    def __init__(self, root: Path, yamls: Sequence[str], videos: int) -> None:
        command = [sys.executable, __file__, "--work", "--videos", str(videos), *yamls]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(ROOT)]), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=root
        )
        if (imported := self._answer().strip()) != str(root):
            sys.exit(f"{root} was to be timed, and {imported} was imported")

    def time(self, yaml: str, kind: str) -> float:
        """Seconds of one step."""
        assert self.process.stdin
        self.process.stdin.write(f"{yaml} {kind}\n")
        self.process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        assert self.process.stdout
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit("the process of a checkout died: see above")
        return answer


def compare(yamls: Sequence[str], against: Path | None, rounds: int, videos: int) -> list[dict[str, Any]]:
    """Medians in milliseconds of each yaml's steps, and the ratio of this checkout's time to the other's."""
    checkouts = {"here": Checkout(ROOT, yamls, videos)} | ({"there": Checkout(against, yamls, videos)} if against else {})
    times: defaultdict[tuple[str, str, str], list[float]] = defaultdict(list)
    for round_ in range(rounds + 1):  # the first warms up
        for yaml in yamls:
            for kind in ("training", "sampling"):
                for name, checkout in checkouts.items():
                    took = checkout.time(yaml, kind)
                    if round_:
                        times[yaml, kind, name].append(took)
    for checkout in checkouts.values():
        checkout.process.communicate()
    rows = []
    for yaml in yamls:
        for kind in ("training", "sampling"):
            medians = {name: 1000 * statistics.median(times[yaml, kind, name]) for name in checkouts}
            row = {"yaml": yaml, "step": kind, **medians}
            rows.append(row | ({"ratio": medians["here"] / medians["there"]} if against else {}))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("yamls", nargs="*", default=YAMLS, help=f"training yamls (default {' '.join(YAMLS)})")
    parser.add_argument("--against", type=Path, help="the root of another checkout")
    parser.add_argument("--rounds", type=int, default=9, help="measured rounds, after one that warms up (default 9)")
    parser.add_argument("--videos", type=int, default=4, help="videos at once (default 4)")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.yamls, arguments.videos)
        return
    if min(arguments.rounds, arguments.videos) < 1:
        parser.error("--rounds and --videos must be at least 1")
    if arguments.against and not (arguments.against / "model/denoiser.py").exists():
        parser.error(f"--against: {arguments.against} is no checkout of this project")
    rows = compare(arguments.yamls, arguments.against and arguments.against.resolve(), arguments.rounds, arguments.videos)
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"{'yaml':30}{'step':10}{'here ms':>10}" + (f"{'there ms':>10}{'ratio':>8}" if arguments.against else ""))
    for row in rows:
        there = f"{row['there']:10.1f}{row['ratio']:8.2f}" if arguments.against else ""
        print(f"{row['yaml']:30}{row['step']:10}{row['here']:10.1f}{there}")


if __name__ == "__main__":
    from model import cpu_memory

    cpu_memory.tune()  # may start the process afresh
    main()
