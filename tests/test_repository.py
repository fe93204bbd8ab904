"""The house rules that a machine can check: layers, imports, file sizes, no pickle, pins, headers, links."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("model", "dataprep", "pipelines")
FORBIDDEN_LAYERS = {"model": {"dataprep", "pipelines"}, "dataprep": {"pipelines"}, "pipelines": {"dataprep"}}
MAX_LINES = 400

# The parts that run on any machine with a recent torch.
TORCH_ALONE = (
    "model/networks", "model/diffusion", "model/lamb.py", "model/optimizers.py", "model/denoiser.py", "model/codec.py",
    "model/draws.py", "model/generate.py", "model/planning/meta_step.py", "model/planning/trace.py",
    "model/planning/roofline.py", "model/planning/device_memory.py", "model/gradients.py",
)  # fmt: skip
TORCH_ALONE_MODULES = {"torch", "einops"}

PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def sources() -> list[Path]:
    return sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))


def yamls() -> list[Path]:
    return sorted((ROOT / "yamls").rglob("*.yaml"))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of all imports, those inside functions too; ``from a import b`` gives a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def dangers(tree: ast.AST) -> Iterator[str]:
    """Ways by which data could run code: pickle, unsafe yaml and torch loads, shells, eval."""
    for module in imports(tree):
        if module.split(".")[0] in PICKLES:
            yield f"imports {module}"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in {"eval", "exec", "os.system", "os.popen"} or called in {"yaml.load", "yaml.unsafe_load", "yaml.full_load"}:
            yield f"line {node.lineno}: {called}"
        if called == "torch.load" and keywords.get("weights_only") != "True":
            yield f"line {node.lineno}: torch.load without weights_only=True"
        if keywords.get("shell", "False") != "False":
            yield f"line {node.lineno}: {called}(shell={keywords['shell']})"
        if keywords.get("allow_pickle", "False") != "False":
            yield f"line {node.lineno}: {called}(allow_pickle={keywords['allow_pickle']})"


@pytest.mark.parametrize("path", sources(), ids=name)
def test_source_file_obeys_the_house_rules(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = parse(path)
    layer = path.relative_to(ROOT).parts[0]
    assert text.count("\n") <= MAX_LINES, f"over {MAX_LINES} lines: it wants a wall"
    assert path.stem not in {"util", "utils", "helpers", "misc", "common"}
    crossed = {module.split(".")[0] for module in imports(tree)} & FORBIDDEN_LAYERS[layer]
    assert not crossed, f"{layer} must not import {sorted(crossed)}"
    assert list(dangers(tree)) == []
    if path.name == "__init__.py":
        assert list(imports(tree)) == [], "an __init__ re-exports nothing"
    elif tree.body:
        assert ast.get_docstring(tree), "a module says in its first line what it is"


@pytest.mark.parametrize("path", [p for p in sources() if name(p).startswith(TORCH_ALONE)], ids=name)
def test_what_a_machine_without_composer_runs_imports_torch_alone(path: Path) -> None:
    own = [part.removesuffix(".py").replace("/", ".") for part in TORCH_ALONE]
    packages = {"model", "model.planning"}  # their __init__ is empty
    for module in imports(parse(path)):
        top = module.split(".")[0]
        if top == "model":
            assert module in packages or any(f"{module}.".startswith(f"{part}.") for part in own), module
        else:
            assert top in TORCH_ALONE_MODULES or top in sys.stdlib_module_names, module


def test_the_schema_imports_the_standard_library_alone() -> None:
    assert {module.split(".")[0] for module in imports(parse(ROOT / "model/data/schema.py"))} <= sys.stdlib_module_names


@pytest.mark.parametrize(
    "snippet",
    [
        "import pickle",
        "def f():\n    from cloudpickle import loads",
        "yaml.load(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "subprocess.run(f'ffmpeg {path}', shell=True)",
        "numpy.load(path, allow_pickle=True)",
        "os.system('ls')",
    ],
)
def test_dangers_are_seen(snippet: str) -> None:
    assert list(dangers(ast.parse(snippet)))


@pytest.mark.parametrize(
    "snippet", ["torch.load(path, weights_only=True)", "yaml.safe_load(text)", "subprocess.run(['ls'])", "numpy.load(path)"]
)
def test_safe_calls_pass(snippet: str) -> None:
    assert list(dangers(ast.parse(snippet))) == []


@pytest.mark.parametrize("path", [*yamls(), ROOT / ".pre-commit-config.yaml"], ids=name)
def test_yaml_begins_with_a_header(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("# "), "the header says what it is for and how it is run"


def test_every_requirement_is_pinned_within_its_range_and_hashed() -> None:
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    entries = re.split(r"\n(?=\S)", text)
    pins = {}
    for entry in entries:
        if match := re.match(r"([A-Za-z0-9_.-]+)(?:\[[^]]*\])?==(\S+)", entry):
            assert "--hash=sha256:" in entry, f"{match[1]} has no hash"
            pins[canonicalize_name(match[1])] = match[2]
    for file in ("requirements.in", "requirements-dev.in"):
        for line in (ROOT / file).read_text(encoding="utf-8").splitlines():
            if not (wanted := line.split("#")[0].strip()):
                continue
            requirement = Requirement(wanted)
            pinned = pins.get(canonicalize_name(requirement.name))
            assert pinned is not None, f"{file}: {wanted} is not pinned; run `make requirements`"
            assert requirement.specifier.contains(pinned), f"{file}: {wanted}, but requirements.txt pins {pinned}"


def tracked_text() -> Iterator[tuple[str, str]]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for file in filter(None, listed.split("\0")):
        path = ROOT / file
        if path.is_file():
            data = path.read_bytes()
            if b"\0" not in data[:8192]:
                yield file, data.decode("utf-8", errors="replace")


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_no_package_registry_is_named() -> None:
    # In parts, or this file would name them.
    hosts = [
        ".".join(parts) for parts in (("pypi", "org"), ("pythonhosted", "org"), ("anaconda", "org"), ("download", "pytorch"))
    ]
    pattern = re.compile("|".join([*map(re.escape, hosts), r"--(extra-)?index-url[ =]", r"--find-links[ =]"]))
    found = [f"{file}: {match[0]}" for file, text in tracked_text() if (match := pattern.search(text))]
    assert found == []


@pytest.mark.parametrize("path", sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]), ids=name)
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if "://" not in target and not target.startswith(("#", "mailto:")):
            assert (path.parent / target.split("#")[0]).exists(), f"no such file: {target}"
