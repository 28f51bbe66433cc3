"""From a YAML file, a named run and dotted overrides to one `Config`. Imports no torch."""

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from shared.config import Config
from shared.errors import UserError


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice and reads 1e-3 as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise UserError(f"{node.start_mark.name}:{key_node.start_mark.line + 1}: a key must be a word")
            if key_node.value in seen:
                raise UserError(f"{node.start_mark.name}:{key_node.start_mark.line + 1}: {key_node.value!r} twice")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)

    def construct_sequence(self, node: yaml.SequenceNode, deep: bool = False) -> tuple[Any, ...]:  # pyright: ignore
        return tuple(super().construct_sequence(node, deep=True))


# YAML 1.1 reads 1e-3 as text, because it has no dot.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
# A day stays text: 2024-07-26 is what data.template_date wants.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_constructor("tag:yaml.org,2002:seq", _Loader.construct_sequence)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a pipeline and apply `run=NAME` and dotted `key=value` overrides, the later ones winning.

    Args:
        path: YAML file with the sections of `Config`, and `runs:`, a mapping of names to overrides.
        overrides: `run=NAME` and `section.key=value`; the value is read as YAML.

    Raises:
        UserError: the file is missing or not YAML, or a key or value is wrong; names the nearest known key.
    """
    tree = _read_yaml(Path(path))
    runs = tree.pop("runs", None) or {}
    if not isinstance(runs, dict) or not all(isinstance(run, dict | None) for run in runs.values()):
        raise UserError(f"{path}: runs: expected names, each with a mapping of keys to values")
    pairs = [_split(override) for override in overrides]
    names = [value for key, value in pairs if key == "run"]
    for name in names[-1:]:
        if not isinstance(name, str | int) or name not in runs:
            raise UserError(f"run={name}: {path} has no such run; it has {_listed(runs)}")
        for key, value in (runs[name] or {}).items():
            _assign(tree, key, value)
        if not (tree.get("train") or {}).get("output"):
            _assign(tree, "train.output", f"runs/{name}")
    for key, value in pairs:
        if key != "run":
            _assign(tree, key, value)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{path}: " + "; ".join(_explain(item) for item in error.errors())) from None


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the tree."""
    for name, field in model.model_fields.items():
        # The type itself, or what `X | None` may be besides None.
        arguments = () if get_origin(field.annotation) is tuple else get_args(field.annotation)
        kinds = [kind for kind in arguments or [field.annotation] if isinstance(kind, type)]
        section = next((kind for kind in kinds if issubclass(kind, BaseModel)), None)
        if section is None or section is not field.annotation:
            yield f"{prefix}{name}"
        if section is not None:
            yield from known_keys(section, f"{prefix}{name}.")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        loader.name = str(path)
        tree = loader.get_single_data()
    except FileNotFoundError:
        raise UserError(f"{path}: no such pipeline file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping with the sections {list(Config.model_fields)}")
    return tree


def _split(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"{override!r}: expected key=value, such as data.limit=16")
    try:
        return key, yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        return key, text


def _assign(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Set a dotted key; a mapping given for a section of the tree is merged into it."""
    *parents, last = str(dotted).split(".")
    node = tree
    for parent in parents:
        child = node.get(parent)
        node[parent] = dict(child) if isinstance(child, dict) else {}
        node = node[parent]
    if isinstance(value, dict) and isinstance(node.get(last), dict):
        for key, inner in value.items():
            _assign(node, f"{last}.{key}", inner)
    else:
        node[last] = value


def _explain(item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, [*known_keys(), *Config.model_fields], n=1, cutoff=0.0)
        return f"unknown key {key}; the nearest known one is {near[0]}"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return message
    return f"{key}={item['input']!r}: {message[0].lower()}{message[1:]}"


def _listed(names: Any) -> str:
    return ", ".join(sorted(map(str, names))) or "none"
