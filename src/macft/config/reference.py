"""``python -m macft.config.reference``: every configuration key as Markdown, for docs/config-reference.md.

Keys, types and meanings come from the schema and the comments above its fields. Defaults are those of a run without
overrides. Allowed values come from the messages of the checks, which are called with invalid values.
"""

from __future__ import annotations

import ast
import copy
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from macft.config.paths import config_folder
from macft.config.schema import TrainConfig, register_schema
from macft.config.validate import problems, to_plain, to_typed

_WRONG: dict[type, tuple[Any, ...]] = {
    str: ("?",),
    int: (-(10**15), 10**15),
    float: (-1e15, 1e15),
}
_LIMITS = (
    re.compile(r"is not one of (?P<limit>.+)"),
    re.compile(r"must be (?P<limit>.+)"),
    re.compile(r"is not (?P<limit>in .+)"),
    re.compile(r"is neither (?P<limit>.+)"),
    re.compile(r"is not (?P<limit>.+)"),
    re.compile(r"; use (?P<limit>[^(;]+)"),
)
_REASONS = re.compile(r"; (?!use )| \(or |, a run |, or every ")
"""Where the reason begins in a message."""
_OTHER_KEY = re.compile(r"(\w+\.\w+) \([\d.]+\)")
"""Another key with its current value."""
_HEAD = """\
<!-- Made by `python -m macft.config.reference > docs/config-reference.md`; edit the comments in the schema instead. -->
# Every configuration key

Set a key with `key=value` on the command line of `macft.train`, `macft.plan` and `macft.bench`, or in a recipe
([recipes.md](recipes.md)). The default is that of a run without overrides; another option of a group (`thermal=quiet`)
has its own defaults. An invalid value is reported in one line before anything is loaded.
"""


@dataclass(frozen=True)
class Key:
    """A leaf of the schema: its dotted name, its type in words, and the comment above it."""

    name: str
    type: str
    meaning: str


def keys(schema: type, prefix: str = "") -> Iterator[Key]:
    """The leaves of a dataclass schema, depth first, in the order of their definition."""
    hints = get_type_hints(schema)
    meanings = _comments(schema)
    for item in fields(schema):
        name, kind = f"{prefix}{item.name}", hints[item.name]
        if is_dataclass(kind):
            yield from keys(cast(type, kind), f"{name}.")
        else:
            yield Key(name, type_name(kind), meanings.get(item.name, ""))


def type_name(kind: Any) -> str:
    """A type in words, for users of YAML: ``int or null``, ``list of str``."""
    if kind is type(None):
        return "null"
    if kind is Any:
        return "any"
    parts = get_args(kind)
    if not parts:
        return str(kind.__name__)
    if getattr(kind, "__origin__", None) is list:
        return "list of mappings" if is_dataclass(parts[0]) else f"list of {type_name(parts[0])}"
    if getattr(kind, "__origin__", None) is dict:
        return "mapping"
    return " or ".join(type_name(part) for part in parts)


def _comments(schema: type) -> dict[str, str]:
    """The comment lines directly above each field, including inherited fields."""
    comments: dict[str, str] = {}
    for owner in reversed(schema.__mro__):
        if not is_dataclass(owner):
            continue
        source = textwrap.dedent(inspect.getsource(owner))
        lines = source.splitlines()
        tree = ast.parse(source).body[0]
        assert isinstance(tree, ast.ClassDef)
        for node in tree.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                comment: list[str] = []
                above = node.lineno - 2
                while lines[above].lstrip().startswith("#"):
                    comment.insert(0, lines[above].lstrip().removeprefix("#").strip())
                    above -= 1
                comments[node.target.id] = " ".join(comment)
    return comments


def allowed(config: TrainConfig, name: str) -> str:
    """The values that the check of a key allows, in its own words; empty if it allows every value of the type."""
    *path, leaf = name.split(".")
    limits: list[str] = []
    before = set(problems(config))
    for wrong in _wrong_values(name):
        changed = copy.deepcopy(config)
        part: Any = changed
        for step in path:
            part = getattr(part, step)
        setattr(part, leaf, wrong)
        for line in sorted(set(problems(changed)) - before):
            limits += [_limit(line, name)] if line.startswith(f"{name}: ") else []
    return "; ".join(dict.fromkeys(filter(None, limits)))


def _wrong_values(name: str) -> tuple[Any, ...]:
    kind: Any = TrainConfig
    for step in name.split("."):
        kind = get_type_hints(kind)[step]
    if isinstance(kind, type) and kind in _WRONG:
        return _WRONG[kind]
    if kind is Any:
        return _WRONG[str]
    union = isinstance(kind, UnionType) or get_origin(kind) is Union
    return next((_WRONG[part] for part in get_args(kind) if part in _WRONG), ()) if union else ()


def _limit(line: str, name: str) -> str:
    text = _REASONS.split(_OTHER_KEY.sub(r"\1", line.removeprefix(f"{name}: ")), maxsplit=1)[0]
    match = next(filter(None, (pattern.search(text) for pattern in _LIMITS)), None)
    return match["limit"].replace(" nor ", " or ").split("; ")[0].strip() if match else ""


def default_config() -> TrainConfig:
    """The configuration of a run without overrides."""
    register_schema()
    with initialize_config_dir(str(config_folder().absolute()), version_base="1.3"):
        return to_typed(compose("train"))


def reference() -> str:
    """The whole page."""
    config = default_config()
    plain = OmegaConf.create(to_plain(config))
    parts = [_HEAD]
    section = None
    for key in keys(TrainConfig):
        group = key.name.split(".")[0] if "." in key.name else ""
        if group != section:
            section = group
            parts.append(_heading(group))
        limit = "true, false" if key.type == "bool" else allowed(config, key.name)
        parts.append(_row(key, OmegaConf.select(plain, key.name), limit))
    return "\n".join(parts) + "\n"


def _heading(group: str) -> str:
    lines = ["", f"## {group}" if group else "## The run", ""]
    options = sorted((config_folder() / group).glob("*.yaml")) if group else []
    for option in options:
        lines.append(f"- `{group}={option.stem}`: {about(option)}")
    lines += [""] * bool(options) + ["| key | type | default | allowed | meaning |", "| --- | --- | --- | --- | --- |"]
    return "\n".join(lines)


def about(option: Path) -> str:
    """The first comment of a YAML file of a group, in one line."""
    comment: list[str] = []
    for line in option.read_text(encoding="utf-8").splitlines():
        if line.startswith("# @package"):
            continue
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").strip())
    return " ".join(comment)


def _row(key: Key, default: Any, limit: str) -> str:
    shown = "null" if default is None else str(default).replace("'", "")
    shown = shown.lower() if isinstance(default, bool) else shown
    cells = [f"`{key.name}`", key.type, f"`{shown}`" if shown else "empty", limit, key.meaning]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    sys.stdout.write(reference())
