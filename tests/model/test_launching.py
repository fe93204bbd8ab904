"""Several nodes: what deploy/ starts on each, here as two launchers on one machine."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

ROOT = Path(__file__).parents[2]


# A node has shared memory of its own.
ALONE = ["unshare", "--map-root-user", "--mount", "bash", "-c", 'mount -t tmpfs none /dev/shm && exec "$@"', "node"]


@pytest.mark.slow
@pytest.mark.skipif(subprocess.run([*ALONE, "true"], capture_output=True).returncode != 0, reason="needs mount namespaces")
def test_two_launchers_as_two_nodes_train_the_same_weights(tmp_path: Path, training: Callable[..., Any]) -> None:
    one, two = (training(tmp_path / name, steps=8) for name in ("one", "two"))
    one.finish(one.start())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    two.write_yaml()
    launcher = [str(Path(sys.executable).with_name("composer")), "-n", "1", "--world_size", "2", "--master_addr", "127.0.0.1"]
    nodes = []
    for node in (0, 1):
        place = ["--master_port", str(port), "--node_rank", str(node), "--base_rank", str(node)]
        command = [*ALONE, *launcher, *place, "model/train.py", str(two.folder / "tiny.yaml")]
        log = (two.folder / f"node-{node}.txt").open("w")
        nodes.append(subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True))
    assert [node.wait(timeout=240) for node in nodes] == [0, 0], (two.folder / "node-0.txt").read_text()[-3000:]
    reference = one.weights()
    for name, tensor in two.weights().items():
        # Not to the bit: a process that is alone on its node takes all of its threads, and sums in another order.
        torch.testing.assert_close(tensor, reference[name], rtol=1e-3, atol=1e-5, msg=name)


def test_the_slurm_script_starts_a_launcher_per_node_and_requeues_a_stopped_run(tmp_path: Path) -> None:
    """With stand-ins for Slurm's commands and for the launcher, which note what they are called with."""
    calls = tmp_path / "calls"
    (tmp_path / ".venv/bin").mkdir(parents=True)
    for path, body in {
        "scontrol": 'echo "scontrol $*" >> "$CALLS"; if [ "$1" = show ]; then echo node-a; echo node-b; fi',
        "srun": 'shift; SLURM_NODEID=1 "$@"',
        ".venv/bin/composer": 'echo "composer $*" >> "$CALLS"; exit 143',
    }.items():
        (tmp_path / path).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / path).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4"}
    environment = {
        **os.environ,
        **slurm,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "CALLS": str(calls),
        "SLURM_TMPDIR": str(tmp_path),
    }
    command = ["bash", str(ROOT / "deploy/train.slurm"), "yamls/stage1.yaml", "name=a b"]
    assert subprocess.run(command, env=environment, cwd=tmp_path).returncode == 143
    assert calls.read_text().splitlines() == [
        "scontrol show hostnames node-[a-b]",
        "composer -n 4 --world_size 8 --node_rank 1 --base_rank 4 --master_addr node-a --master_port 20077 model/train.py"
        " yamls/stage1.yaml name=a b",
        "scontrol requeue 77",
    ]
    usage = subprocess.run(command[:2], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert usage.returncode == 2 and usage.stderr.startswith("usage: sbatch")


def test_the_kubernetes_job_is_consistent() -> None:
    service, job = yaml.safe_load_all((ROOT / "deploy/train.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == int(environment["NODES"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(environment["GPUS"])
    # Pod 0 is found as JOB-0.SUBDOMAIN, for which the service must carry the subdomain's name and select the job's pods.
    assert f"--master_addr {job['metadata']['name']}-0.{pod['subdomain']} " in container["args"][0]
    assert service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
