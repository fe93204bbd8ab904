"""The shape that all commands share, as a user meets it."""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from model import command
from model.command import Flag
from model.errors import RunError, UserError


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5


@dataclass(frozen=True)
class Options:
    name: str
    inner: Inner = field(default_factory=Inner)


@pytest.fixture
def path(tmp_path: Path) -> str:
    (tmp_path / "options.yaml").write_text("name: x")
    return str(tmp_path / "options.yaml")


def fail(options: Options) -> None:
    raise UserError(f"no such folder: {options.name}")


def test_the_body_gets_the_config(path: str) -> None:
    seen: list[Options] = []
    command.run(Options, seen.append, "Does.", [path])
    command.run(Options, seen.append, "Does.", [path, "inner.rate=2", "name=y"])
    command.run(Options, seen.append, "Does.", ["--debug", path, "name=z"])
    command.run(Options, seen.append, "Does.", [path, "--debug", "name=z"])
    assert seen == [Options("x"), Options("y", Inner(2.0)), Options("z"), Options("z")]


def test_the_body_gets_its_flags(path: str) -> None:
    seen: list[tuple[Options, bool, int]] = []

    def body(options: Options, as_json: bool, gpus: int) -> None:
        seen.append((options, as_json, gpus))

    flags = [Flag("as-json", False, "print JSON"), Flag("gpus", 8, "how many")]
    command.run(Options, body, "Does.", [path], flags=flags)
    command.run(Options, body, "Does.", [path, "--gpus", "64", "name=y", "--as-json"], flags=flags)
    assert seen == [(Options("x"), False, 8), (Options("y"), True, 64)]
    with pytest.raises(SystemExit) as caught:
        command.run(Options, body, "Does.", [path, "--gpus", "many"], flags=flags)
    assert caught.value.code == 2


def test_bad_input_is_one_line_and_exit_code_2(path: str, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        command.run(Options, fail, "Does.", [path])
    assert caught.value.code == 2
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", "error: no such folder: x\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}/nowhere.yaml"], "error: no such yaml file: {}/nowhere.yaml\n"),
        (["{}/options.yaml", "inner.rat=3"], "error: {}/options.yaml: unknown key 'inner.rat'; did you mean 'inner.rate'?\n"),
        (["{}/options.yaml", "inner.rate=x"], "error: {}/options.yaml: inner.rate: Input should be a valid number, got 'x'\n"),
        (["{}/options.yaml", "rubbish"], "error: override 'rubbish' is not of the form key=value\n"),
    ],
)
def test_a_bad_config_is_one_line_too(path: str, tmp_path: Path, capsys, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as caught:
        command.run(Options, fail, "Does.", [argument.format(tmp_path) for argument in arguments])
    assert caught.value.code == 2
    assert capsys.readouterr().err == message.format(tmp_path)


def test_debug_shows_where(path: str, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        command.run(Options, fail, "Does.", [path, "--debug"])
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert "Traceback (most recent call last)" in told
    assert "in fail" in told
    assert told.endswith("error: no such folder: x\n")


def test_work_that_cannot_go_on_is_one_line_and_exit_code_1(path: str, capsys) -> None:
    def stop(options: Options) -> None:
        raise RunError("step 3 stopped: the loss is nan")

    with pytest.raises(SystemExit) as caught:
        command.run(Options, stop, "Does.", [path])
    assert caught.value.code == 1
    assert capsys.readouterr().err == "error: step 3 stopped: the loss is nan\n"


def test_other_errors_are_not_hidden(path: str) -> None:
    def broken(options: Options) -> None:
        raise KeyError("a mistake of ours")

    with pytest.raises(KeyError, match="a mistake of ours"):
        command.run(Options, broken, "Does.", [path])


def test_help_lists_keys_defaults_and_the_example(capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        command.run(Options, fail, "  Does something.\n\n  At length.", ["--help"], example="python -m it yamls/it.yaml")
    assert caught.value.code == 0
    told = capsys.readouterr().out
    assert "Does something.\n\nAt length." in told
    for line in ("  name: str  (required)", "  inner.rate: float = 0.5", "  python -m it yamls/it.yaml", "--debug"):
        assert line in told


def test_no_yaml_is_told_with_the_usage(capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        command.run(Options, fail, "Does.", [])
    assert caught.value.code == 2
    assert "yaml" in capsys.readouterr().err


def test_a_process_sees_the_exit_code(tmp_path: Path, path: str) -> None:
    script = tmp_path / "it.py"
    script.write_text(
        "from dataclasses import dataclass\n"
        "from model import command\n"
        "from model.errors import UserError\n"
        "@dataclass(frozen=True)\n"
        "class Options:\n"
        "    name: str\n"
        "def body(options):\n"
        "    raise UserError('told')\n"
        "command.run(Options, body, 'Does.')\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), path], capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2],
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": ""},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: told\n")
