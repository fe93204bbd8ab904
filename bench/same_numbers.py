"""Does this checkout train and plan as another one does, to the digit? ``python bench/same_numbers.py --against DIR [--help]``.

For a rebuilding that must change no result. Both checkouts go through what a user types: the data are made once, by the other
checkout; then each trains 50 steps of the yamls of ``make demo`` and ``make learn`` from the same seed, and plans every training
yaml that both have. Losses, the published weights and the plans must be equal; what differs is printed, with exit code 1. To
compare with an earlier commit: ``git worktree add ../before COMMIT``. Seven minutes on two CPU cores.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

ROOT = Path(__file__).parents[1]
CHAINS = {"demo": "DEMO_FOLDER", "learn": "LEARN_FOLDER"}  # the variable by which the yamls of each learn their folder
SMALL = {"demo": ["num_videos=24", "num_images=24"], "learn": ["num_videos=64", "num_images=48"]}
TRAINED = ["yamls/demo/stage1.yaml", "yamls/demo/stage2.yaml", "yamls/learn/stage1.yaml", "yamls/learn/stage2.yaml"]
OTHERS = ["samples=null", "evaluation=null", "publish=null", "checkpoints.every=1000"]  # what the numbers do not depend on


def call(checkout: Path, words: Sequence[str], environment: dict[str, str]) -> str:
    """Run a command of a checkout and return what it prints."""
    both = {**os.environ, **environment, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(words, cwd=checkout, env=both, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(words)} in {checkout}: exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


def prepare(checkout: Path, chain: str, folder: Path) -> None:
    """Media, text encoder and shards of a chain, unless they are there."""
    if (folder / "shards/stage1/videos/manifest.json").exists():
        return
    module, environment = [sys.executable, "-m"], {CHAINS[chain]: str(folder)}
    call(checkout, [*module, "dataprep.scene_files", f"yamls/{chain}/scenes.yaml", *SMALL[chain]], environment)
    call(checkout, [*module, "dataprep.small_t5", f"yamls/{chain}/small_t5.yaml"], environment)
    call(checkout, [*module, "dataprep.run", f"yamls/{chain}/dataprep.yaml"], environment)


def train(checkout: Path, yaml: str, data: Path, folder: Path, steps: int) -> dict[str, Any]:
    """Losses of a training run, and the hash of its averaged weights."""
    shutil.rmtree(folder, ignore_errors=True)
    variable = CHAINS[Path(yaml).parent.name]
    initialise = ["initialise_from=null"]  # a stage 2 starts from a stage 1 that is not there
    own = [f"folder={folder}", f"tracking.uri=sqlite:///{folder}/mlflow.db", f"schedule.steps={steps}", "name=run", *initialise]
    launcher = str(Path(sys.executable).with_name("composer"))
    call(checkout, [launcher, "-n", "1", "model/train.py", yaml, *own, *OTHERS], {variable: str(data)})
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (run,) = (run for experiment in client.search_experiments() for run in client.search_runs([experiment.experiment_id]))
    losses = [m.value for m in sorted(client.get_metric_history(run.info.run_id, "loss/train/total"), key=lambda m: m.step)]
    (weights,) = folder.glob("run/model-step-*/model.safetensors")
    return {"losses": losses, "weights": tensors_hash(weights)}


def tensors_hash(path: Path) -> dict[str, str]:
    """Of each tensor's bytes, so that new metadata or another order does not matter."""
    from safetensors.numpy import load_file

    return {name: hashlib.sha256(tensor.tobytes()).hexdigest()[:16] for name, tensor in sorted(load_file(path).items())}


def plan(checkout: Path, yaml: str) -> dict[str, Any]:
    """What ``pipelines.plan --json`` says."""
    gpus = "2" if Path(yaml).parent.name in CHAINS else "8"
    return json.loads(call(checkout, [sys.executable, "-m", "pipelines.plan", yaml, "--json", "--gpus", gpus], {}))


def training_yamls(checkout: Path) -> set[str]:
    """The yamls of a checkout that train."""
    paths = (
        path for pattern in ("stage*.yaml", "unet*.yaml", "ablations/*.yaml") for path in (checkout / "yamls").rglob(pattern)
    )
    return {path.relative_to(checkout).as_posix() for path in paths}


def differences(here: Any, there: Any, path: str = "") -> Iterator[str]:
    """Where two trees differ, a line each; what only one of them has counts."""
    if isinstance(here, dict) and isinstance(there, dict):
        for key in sorted(here.keys() | there.keys()):
            yield from differences(here.get(key, "(nothing)"), there.get(key, "(nothing)"), f"{path}.{key}" if path else key)
    elif isinstance(here, list) and isinstance(there, list) and len(here) == len(there):
        pairs = enumerate(zip(here, there, strict=True))
        if (first := next((f"{path}[{i}]: {a} here, {b} there" for i, (a, b) in pairs if a != b), None)) is not None:
            yield first
    elif here != there:
        yield f"{path}: {here} here, {there} there"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, required=True, help="the root of another checkout")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "runs/same-numbers", help="for data and runs (default runs/same-numbers)"
    )
    parser.add_argument("--steps", type=int, default=50, help="of training (default 50)")
    parser.add_argument("--only", choices=["plans", "training"], help="one of the two")
    arguments = parser.parse_args()
    there, folder = arguments.against.resolve(), arguments.folder.resolve()
    if not (there / "model/train.py").exists():
        parser.error(f"--against: {there} is no checkout of this project")
    found = []
    with ThreadPoolExecutor(2) as pool:  # the two checkouts side by side
        if arguments.only != "training":
            for yaml in sorted(training_yamls(ROOT) & training_yamls(there)):
                here, other = pool.map(plan, (ROOT, there), (yaml, yaml))
                found += _told(f"plan of {yaml}", list(differences(here, other)))
        for yaml in TRAINED if arguments.only != "plans" else []:
            chain = Path(yaml).parent.name
            prepare(there, chain, folder / chain)
            data, steps = folder / chain, arguments.steps
            runs = [
                pool.submit(train, root, yaml, data, folder / name, steps) for root, name in ((ROOT, "here"), (there, "there"))
            ]
            here, other = (run.result() for run in runs)
            found += _told(f"{steps} steps of {yaml}", list(differences(here, other)))
    sys.exit(1 if found else 0)


def _told(what: str, found: list[str]) -> list[str]:
    print(f"{what}: {'equal' if not found else f'{len(found)} differences'}", *found[:10], sep="\n  ", flush=True)
    return found


if __name__ == "__main__":
    main()
