"""Strict yaml configuration for every entry point.

A yaml names only what differs from its base::

    base: base/train.yaml        # one path, or a list merged in order; relative to this file
    network: {latent_tokens: 512}
    optimizer: {kind: adam}      # another kind than the base's: nothing of the base's optimizer remains

``load`` merges the bases, the file and ``key=value`` overrides, then builds a tree of dataclasses. Each component owns its
dataclass, next to the code that reads it. A key that no dataclass declares, or a value of another type, is an error of one line.
"""

import dataclasses
import difflib
import functools
import json
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from model.errors import UserError

T = TypeVar("T")

BASE_KEY = "base"


def load(config_class: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Read ``path`` with its bases, apply ``overrides`` (``a.b=value``, values in yaml syntax), and build ``config_class``.

    Raises:
        UserError: missing file, invalid yaml, unknown key, missing key or wrong type.
    """
    merged = _read_with_bases(Path(path), ())
    for override in overrides:
        if "=" not in override or override.startswith("="):
            raise UserError(f"override {override!r} is not of the form key=value")
        try:
            merged = _merge(merged, OmegaConf.from_dotlist([override]))
        except (OmegaConfBaseException, yaml.YAMLError, TypeError) as error:
            raise UserError(f"override {override!r}: {_first_line(error)}") from error
    try:
        tree = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {_first_line(error)}") from error
    return build(config_class, typing.cast(dict[str, Any], tree), where=str(path))


def read(path: str | Path) -> dict[str, Any]:
    """The plain tree of ``path`` merged with its bases, interpolations as they stand.

    Raises:
        UserError: missing file or invalid yaml.
    """
    return typing.cast(dict[str, Any], OmegaConf.to_container(_read_with_bases(Path(path), ()), resolve=False))


def build(config_class: type[T], tree: dict[str, Any], where: str) -> T:
    """Build ``config_class`` from a plain tree. ``where`` names the tree's origin in errors.

    Raises:
        UserError: unknown key, missing key or wrong type.
    """
    known = [key for key, _, _ in describe(config_class)]
    _refuse_unknown_keys(config_class, tree, where, "", known)
    try:
        # Through JSON: strict validation then still turns lists into the tuples that frozen dataclasses hold.
        values = json.dumps(tree)
    except TypeError as error:  # bytes, which yaml can say
        raise UserError(f"{where}: {error}") from error
    try:
        return TypeAdapter(config_class).validate_json(values, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        told = first["type"] in ("missing", "value_error")  # our own checks name what they got
        got = "" if told else f", got {first['input']!r}"
        raise UserError(f"{where}: {key or 'top level'}: {message}{got if len(got) < 100 else ''}") from error


def to_tree(config: Any) -> dict[str, Any]:
    """The plain tree (dicts, lists, scalars) of a config dataclass; ``build`` is its inverse."""
    return TypeAdapter(type(config)).dump_python(config, mode="json")


def to_yaml(config: Any) -> str:
    """The resolved yaml of a config dataclass."""
    return yaml.safe_dump(to_tree(config), sort_keys=False)


def describe(config_class: type) -> Iterator[tuple[str, str, str]]:
    """Every key of a config class as (dotted name, type, default); an empty default means that the key is required."""
    yield from _describe(config_class, "")


def _describe(config_class: type, prefix: str) -> Iterator[tuple[str, str, str]]:
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        nested, elements = _dataclasses_in(hints[field.name]), _element_dataclasses_in(hints[field.name])
        if nested or elements:
            for option in nested:
                yield from _describe(option, f"{prefix}{field.name}.")
            for option in elements:
                yield from _describe(option, f"{prefix}{field.name}[].")
            continue
        default = ""
        if field.default is not dataclasses.MISSING:
            default = json.dumps(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            default = json.dumps(field.default_factory())
        hint = hints[field.name]
        yield f"{prefix}{field.name}", hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", ""), default


def _read_with_bases(path: Path, seen: tuple[Path, ...]) -> DictConfig:
    if path.resolve() in seen:
        raise UserError(f"{path}: its bases form a circle")
    if not path.is_file():
        raise UserError(f"no such yaml file: {path}")
    try:
        own = OmegaConf.load(path)  # a safe loader that also reads 5e-3 as a number and refuses duplicate keys
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not valid yaml: {_first_line(error)}") from error
    if not isinstance(own, DictConfig):
        raise UserError(f"{path}: the top level must be a mapping of keys to values")
    merged = [_read_with_bases(path.parent / base, (*seen, path.resolve())) for base in _pop_bases(own, path)]
    try:
        return functools.reduce(_merge, [*merged, own])
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: does not merge with its bases: {_first_line(error)}") from error


def _merge(earlier: DictConfig, later: DictConfig) -> DictConfig:
    """Key by key, the later one wins."""
    plain, over = (OmegaConf.to_container(tree, resolve=False) for tree in (earlier, later))
    return typing.cast(DictConfig, OmegaConf.merge(OmegaConf.create(_of_same_kinds(plain, over)), later))


def _of_same_kinds(earlier: Any, later: Any) -> Any:
    """``earlier`` without the contents of mappings to which ``later`` gives another ``kind``: they are another class's keys."""
    if not isinstance(earlier, dict) or not isinstance(later, dict):
        return earlier
    if "kind" in earlier and later.get("kind", earlier["kind"]) != earlier["kind"]:
        return {}
    return {key: _of_same_kinds(value, later.get(key)) for key, value in earlier.items()}


def _pop_bases(own: DictConfig, path: Path) -> list[str]:
    try:
        bases = own.pop(BASE_KEY, [])
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {BASE_KEY}: {_first_line(error)}") from error
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list | ListConfig) or not all(isinstance(base, str) for base in bases):
        raise UserError(f"{path}: {BASE_KEY} must be a path or a list of paths, got {bases!r}")
    return list(bases)


def _refuse_unknown_keys(config_class: type, tree: Any, where: str, prefix: str, known: list[str]) -> None:
    if not isinstance(tree, dict):
        return  # a wrong type, which validation reports
    hints = typing.get_type_hints(config_class)
    names = [field.name for field in dataclasses.fields(config_class)]
    for key, value in tree.items():
        if key not in names:
            raise UserError(f"{where}: unknown key '{prefix}{key}'{_suggestion(str(key), prefix, names, known)}")
        options = _dataclasses_in(hints[key])
        if options and isinstance(value, dict):
            chosen = _option_of_kind(options, value)
            if chosen is None:
                got = f"got {value['kind']!r}" if "kind" in value else "it is missing"
                raise UserError(f"{where}: {prefix}{key}.kind must be one of {', '.join(_kinds(options))}; {got}")
            _refuse_unknown_keys(chosen, value, where, f"{prefix}{key}.", known)
        elements = _element_dataclasses_in(hints[key])
        if elements and isinstance(value, list):
            for index, element in enumerate(value):
                _refuse_unknown_keys(elements[0], element, where, f"{prefix}{key}[{index}].", known)


def _suggestion(key: str, prefix: str, siblings: list[str], known: list[str]) -> str:
    near = difflib.get_close_matches(key, siblings, n=1)
    if near:
        return f"; did you mean '{prefix}{near[0]}'?"
    by_last_part = {name.rsplit(".", 1)[-1]: name for name in known}
    near = difflib.get_close_matches(key, list(by_last_part), n=1)
    if near:
        return f"; did you mean '{by_last_part[near[0]]}'?"
    nearest = difflib.get_close_matches(key, siblings, n=1, cutoff=0.0)
    return f"; the nearest is '{prefix}{nearest[0]}'" if nearest else ""


def _option_of_kind(options: list[type], value: dict[str, Any]) -> type | None:
    """Of the dataclasses of a union, the one whose ``kind`` default matches; of one, that one."""
    if len(options) == 1:
        return options[0]
    return next((option for option in options if value.get("kind") in _kinds([option])), None)


def _kinds(options: list[type]) -> list[str]:
    return [kind for option in options for kind in typing.get_args(typing.get_type_hints(option).get("kind"))]


def _dataclasses_in(hint: Any) -> list[type]:
    """The dataclasses of a hint: itself, or the members of a union such as ``A | None``."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return [hint]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [option for member in typing.get_args(hint) for option in _dataclasses_in(member)]
    return []


def _element_dataclasses_in(hint: Any) -> list[type]:
    """The dataclass of a hint ``tuple[A, ...]``: a yaml list of mappings."""
    return _dataclasses_in(typing.get_args(hint)[0]) if typing.get_origin(hint) is tuple else []


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "; ".join(lines[:2]) if lines else type(error).__name__
