"""Strict yamls: what they may say, and how they are told what they may not."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from model import config
from model.errors import UserError


@dataclass(frozen=True)
class Leaf:
    rate: float = 0.1
    kind: Literal["leaf"] = "leaf"


@dataclass(frozen=True)
class Needle:
    kind: Literal["needle"] = "needle"
    length: int = 3


@dataclass(frozen=True)
class Branch:
    leaf: Leaf = field(default_factory=Leaf)
    size: tuple[int, int, int] = (1, 2, 3)
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tree:
    name: str
    steps: int = 10
    branch: Branch = field(default_factory=Branch)
    either: Leaf | Needle = field(default_factory=Leaf)
    spare: Leaf | None = None
    leaves: tuple[Leaf, ...] = ()
    note: str | None = None
    loud: bool = False

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError("steps must not be negative")


@pytest.fixture
def write(tmp_path: Path):
    """``write(text, name)`` writes a yaml and returns its path."""

    def write_yaml(text: str, name: str = "tree.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write_yaml


def refused(path: Path, *overrides: str) -> str:
    """The one line by which ``path`` is refused."""
    with pytest.raises(UserError) as caught:
        config.load(Tree, path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_fill_what_is_not_named(write) -> None:
    assert config.load(Tree, write("name: x")) == Tree("x")


def test_values_are_of_the_declared_types(write) -> None:
    tree = config.load(
        Tree,
        write("""
            name: x
            steps: 550_000
            branch: {leaf: {rate: 5e-3}, size: [4, 5, 6], names: [a, "1"]}
            spare: {rate: 2}
            leaves: [{rate: 1}, {}]
            either: {kind: needle, length: 9}
            loud: true
        """),
    )
    assert tree.steps == 550_000
    assert tree.branch == Branch(Leaf(0.005), (4, 5, 6), ("a", "1"))
    assert isinstance(tree.branch.size, tuple)
    assert tree.spare == Leaf(2.0)
    assert isinstance(tree.spare.rate, float)
    assert tree.leaves == (Leaf(1.0), Leaf())
    assert tree.either == Needle(length=9)
    assert tree.loud is True


@pytest.mark.parametrize("text", ["5e-3", "5E-3", "0.005", "5.0e-03"])
def test_all_notations_of_a_number_are_numbers(write, text: str) -> None:
    path = write(f"{{name: x, branch: {{leaf: {{rate: {text}}}}}}}")
    assert config.load(Tree, path).branch.leaf.rate == 0.005
    assert config.load(Tree, write("name: x"), [f"branch.leaf.rate={text}"]).branch.leaf.rate == 0.005


def test_bases_merge_in_order_and_the_file_itself_wins(write, tmp_path: Path) -> None:
    write("{name: root, steps: 1, branch: {leaf: {rate: 0.25}, names: [a, b]}, note: root}", "bases/root.yaml")
    write("{base: root.yaml, steps: 2, branch: {size: [7, 8, 9]}}", "bases/middle.yaml")
    write("{note: other, steps: 3}", "other.yaml")
    tree = config.load(Tree, write("base: [bases/middle.yaml, other.yaml]\nbranch: {names: [c]}", "tree.yaml"))
    assert tree == Tree("root", 3, Branch(Leaf(0.25), (7, 8, 9), ("c",)), note="other")
    assert config.load(Tree, write("{base: bases/middle.yaml}", "one.yaml")).steps == 2


def test_a_diamond_of_bases_is_no_circle(write) -> None:
    write("{name: root, steps: 1}", "root.yaml")
    write("{base: root.yaml, steps: 2}", "left.yaml")
    write("{base: root.yaml, note: right}", "right.yaml")
    assert config.load(Tree, write("base: [left.yaml, right.yaml]")) == Tree("root", 1, note="right")


def test_a_circle_of_bases_is_refused(write) -> None:
    write("base: b.yaml", "a.yaml")
    path = write("base: a.yaml", "b.yaml")
    assert "its bases form a circle" in refused(path)
    assert "its bases form a circle" in refused(write("base: self.yaml", "self.yaml"))


def test_another_kind_takes_the_place_of_the_bases(write) -> None:
    write("{name: x, branch: {leaf: {kind: leaf, rate: 0.5}}, either: {kind: leaf, rate: 0.25}}", "base.yaml")
    path = write("{base: base.yaml, either: {kind: needle, length: 5}}")
    tree = config.load(Tree, path)
    assert tree.either == Needle(length=5)  # the rate, which a needle does not have, is gone
    assert tree.branch.leaf == Leaf(0.5)
    assert config.load(Tree, write("{base: base.yaml, either: {kind: leaf}}", "same.yaml")).either == Leaf(0.25)
    assert config.load(Tree, write("{base: base.yaml, steps: 3}", "silent.yaml")).either == Leaf(0.25)
    assert config.load(Tree, path, ["either.kind=leaf", "either.rate=2"]).either == Leaf(2.0)
    write("{name: x, steps: 3, either: {kind: leaf, rate: '${steps}'}}", "reference.yaml")
    assert config.load(Tree, write("{base: reference.yaml, steps: 4}", "referring.yaml")).either == Leaf(4.0)


@pytest.mark.parametrize(
    ("either", "got"),
    [("{length: 4}", "it is missing"), ("{}", "it is missing"), ("{kind: nedle}", "got 'nedle'"), ("{kind: 3}", "got 3")],
)
def test_a_kind_that_is_missing_or_unknown_is_told_with_those_there_are(write, either: str, got: str) -> None:
    told = refused(write(f"{{name: x, either: {either}}}"))
    assert told.endswith(f"either.kind must be one of leaf, needle; {got}")


def test_overrides_win_over_the_file(write) -> None:
    path = write("{name: x, steps: 1, spare: {rate: 3}, note: n, leaves: [{rate: 1}]}")
    overrides = [
        "steps=7",
        "branch.leaf.rate=1e-2",
        "branch.size=[4,5,6]",
        'branch.names=["a red circle, moving left", "b=c"]',
        "spare=null",
        "note=a=b",
        "loud=true",
        "either={kind: needle, length: 4}",
        "steps=8",  # the last one counts
    ]
    tree = config.load(Tree, path, overrides)
    branch = Branch(Leaf(0.01), (4, 5, 6), ("a red circle, moving left", "b=c"))
    assert tree == Tree("x", 8, branch, Needle(length=4), None, (Leaf(1.0),), "a=b", True)


def test_values_refer_to_others_and_to_the_environment(write, monkeypatch) -> None:
    monkeypatch.setenv("LEAF_RATE", "0.75")
    path = write(
        """
        name: x-${steps}
        steps: 3
        branch: {leaf: {rate: "${oc.decode:${oc.env:LEAF_RATE}}"}}
        note: ${oc.env:NONE_SUCH,fallback}
        """
    )
    tree = config.load(Tree, path, ["steps=4"])
    assert (tree.name, tree.branch.leaf.rate, tree.note) == ("x-4", 0.75, "fallback")
    assert "NONE_SUCH" in refused(write("name: ${oc.env:NONE_SUCH}"))
    assert "nothing" in refused(write("name: ${nothing}"))


UNKNOWN = [
    ("{name: x, stesp: 3}", (), "unknown key 'stesp'; did you mean 'steps'?"),
    ("{name: x, branch: {leef: {}}}", (), "unknown key 'branch.leef'; did you mean 'branch.leaf'?"),
    ("{name: x, branch: {leaf: {rat: 1}}}", (), "unknown key 'branch.leaf.rat'; did you mean 'branch.leaf.rate'?"),
    ("{name: x, spare: {rete: 1}}", (), "unknown key 'spare.rete'; did you mean 'spare.rate'?"),
    ("{name: x, leaves: [{rate: 1}, {rote: 1}]}", (), "unknown key 'leaves[1].rote'; did you mean 'leaves[1].rate'?"),
    ("{name: x, either: {kind: needle, lenght: 1}}", (), "unknown key 'either.lenght'; did you mean 'either.length'?"),
    ("{name: x, zzzz: 1}", (), "unknown key 'zzzz'; the nearest is '"),
    ("{name: x, 7: 1}", (), "unknown key '7'"),
    ("name: x", ("branch.leaf.rte=1",), "unknown key 'branch.leaf.rte'; did you mean 'branch.leaf.rate'?"),
    ("name: x", ("brunch.leaf.rate=1",), "unknown key 'brunch'; did you mean 'branch'?"),
    ("name: x", ("base=y.yaml",), "unknown key 'base'"),
]


@pytest.mark.parametrize(("text", "overrides", "message"), UNKNOWN)
def test_an_unknown_key_names_the_nearest(write, text: str, overrides: tuple[str, ...], message: str) -> None:
    assert message in refused(write(text), *overrides)


def test_a_key_of_elsewhere_is_told_with_its_path(write) -> None:
    assert refused(write("{name: x, size: [1, 2, 3]}")).endswith("did you mean 'branch.size'?")


WRONG = [
    ("{name: x, steps: three}", "steps: Input should be a valid integer, got 'three'"),
    ("{name: x, steps: '3'}", "steps: Input should be a valid integer, got '3'"),
    ("{name: x, steps: 3.5}", "steps: Input should be a valid integer"),
    ("{name: x, steps: true}", "steps: Input should be a valid integer"),
    ("{name: x, steps: null}", "steps: Input should be a valid integer"),
    ("{name: 5}", "name: Input should be a valid string, got 5"),
    ("{name: x, loud: 1}", "loud: Input should be a valid boolean"),
    ("{name: x, branch: 5}", "branch: "),
    ("{name: x, branch: [1]}", "branch: "),
    ("{name: x, branch: {size: [1, 2]}}", "branch.size"),
    ("{name: x, branch: {size: [1, 2, 3, 4]}}", "branch.size"),
    ("{name: x, branch: {size: 3}}", "branch.size: "),
    ("{name: x, branch: {leaf: {rate: fast}}}", "branch.leaf.rate: Input should be a valid number, got 'fast'"),
    ("{name: x, branch: {leaf: {kind: twig}}}", "branch.leaf.kind: Input should be 'leaf'"),
    ("{name: x, leaves: [{rate: fast}]}", "leaves.0.rate: "),
    ("{name: x, leaves: {rate: 1}}", "leaves: "),
    ("{name: x, leaves: [3]}", "leaves.0: "),
    ("{name: x, steps: -1}", "steps must not be negative"),
    ("{steps: 1}", "name: Field required"),
    ("name: ???", "name"),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_wrong_types_and_missing_keys_are_named(write, text: str, message: str) -> None:
    path = write(text)
    told = refused(path)
    assert message in told
    assert str(path) in told


BROKEN = [
    ("a: [1", "not valid yaml"),
    ("{name: x, name: y}", "not valid yaml"),
    ("- a\n- b", "the top level must be a mapping"),
    ("just text", "unknown key 'just text'"),
    ("name: !!python/object/apply:os.getcwd []", "not valid yaml"),
    ("name: x\nbase: 5", "base must be a path or a list of paths"),
    ("name: x\nbase: [5]", "base must be a path or a list of paths"),
    ("name: x\nbase: {a: b}", "base must be a path or a list of paths"),
    ("name: x\nbase: null", "base must be a path or a list of paths"),
    ("name: x\nbase: ${nothing}", "base: Interpolation key 'nothing' not found"),
    ("name: x\nbase: nowhere.yaml", "no such yaml file: "),
    ("name: !!binary aGVsbG8=", "bytes"),
    ("", "name: Field required"),
]


@pytest.mark.parametrize(("text", "message"), BROKEN)
def test_broken_files_are_told_in_one_line(write, text: str, message: str) -> None:
    assert message in refused(write(text))


def test_what_is_no_file_is_told(tmp_path: Path, write) -> None:
    assert refused(tmp_path / "nowhere.yaml") == f"no such yaml file: {tmp_path / 'nowhere.yaml'}"
    assert refused(tmp_path) == f"no such yaml file: {tmp_path}"
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"name: caf\xe9")
    assert "not valid yaml" in refused(path)


@pytest.mark.parametrize(
    "override", ["steps", "=3", "steps:3", "steps=[1", "branch.leaf.rate.more=3", "leaves.0.rate=x", "a b=3"]
)
def test_overrides_that_make_no_sense_are_told(write, override: str) -> None:
    assert refused(write("name: x"), override)


def test_a_tree_goes_through_yaml_and_back(write) -> None:
    tree = Tree(
        "x", 3, Branch(Leaf(1e-7), (4, 5, 6), ("ünïcode: #1",)), Needle(length=2), Leaf(math.pi), (Leaf(), Leaf(2.5)), None, True
    )
    assert config.load(Tree, write(config.to_yaml(tree))) == tree
    assert config.build(Tree, config.to_tree(tree), "here") == tree


def test_description_lists_every_key() -> None:
    rows = {name: (kind, default) for name, kind, default in config.describe(Tree)}
    assert rows["name"] == ("str", "")
    assert rows["steps"] == ("int", "10")
    assert rows["branch.leaf.rate"] == ("float", "0.1")
    assert rows["branch.size"] == ("tuple[int, int, int]", "[1, 2, 3]")
    assert rows["either.length"] == ("int", "3")
    assert rows["leaves[].rate"] == ("float", "0.1")
    assert rows["spare.rate"] == ("float", "0.1")
