"""The command."""

import json
import re
from pathlib import Path

import pytest

from model import command
from model.train import TrainConfig
from pipelines import plan

ROOT = Path(__file__).resolve().parents[2]
DEMO = str(ROOT / "yamls/demo/stage1.yaml")


def run(*arguments: str) -> None:
    command.run(TrainConfig, plan.show, plan.__doc__ or "", arguments, flags=plan.FLAGS)


def test_json_is_one_flat_object_of_documented_keys(capsys: pytest.CaptureFixture[str]) -> None:
    run(DEMO, "--json", "--gpus", "4", "schedule.steps=7")
    printed = json.loads(capsys.readouterr().out)
    assert printed["gpus"] == 4
    assert printed["run.steps"] == 7
    assert all(not isinstance(value, dict | list) for value in printed.values())
    documented = set(re.findall(r"`([a-z0-9_.]+)`", (ROOT / "docs/plan.md").read_text(encoding="utf-8")))
    keys = {re.sub(r"^(parameters\.components|tokens|time)\..*", r"\1", key) for key in printed}
    assert {"time.h200.eager.step", "time.a100.fused.run"} <= printed.keys()
    assert keys - documented == set()


def test_table_shows_what_was_counted(capsys: pytest.CaptureFixture[str]) -> None:
    run(DEMO, "--gpus", "4", "--gpu-memory", "40")
    printed = capsys.readouterr().out
    for wanted in (
        "on 4 GPUs",
        "blocks.layers",
        "training step",
        "largest microbatch",
        "of 40.00 GiB are usable",
        "NOT as the rule",
    ):
        assert wanted in printed
    assert max(map(len, printed.splitlines())) < 140


def test_roofline_shows_each_part_on_the_gpu_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    run(DEMO, "--roofline", "H200")
    printed = capsys.readouterr().out
    _, _, shown = printed.partition("roofline of a video in a microbatch of")
    assert "on a H200" in shown
    rows = dict(line.split(maxsplit=1) for line in shown.splitlines()[3:])
    assert {"blocks.read", "blocks.layers.attention", "stem", "head"} <= rows.keys()
    assert all(float(cells.split()[3]) > 0 for cells in rows.values())  # ms, eager


def test_a_run_that_does_not_fit_is_called_so(capsys: pytest.CaptureFixture[str]) -> None:
    run(DEMO, "--gpu-memory", "0.01")
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_help_shows_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run("--help")
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for wanted in ("--gpus", "--gpu-memory", "(default 80.0)", "--json", "global_batch: int = 4096"):
        assert wanted in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpus", "3"), "does not split evenly over 3"),
        (("globl_batch=3",), "did you mean 'global_batch'"),
        (("--gpus=-1",), "gpus"),
        (("--roofline=TPU",), "'TPU' is no known GPU; they are A100, H100"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(DEMO, *arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
