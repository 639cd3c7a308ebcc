"""``python -m macft.completion.make_table``: writes the table of options and keys that completion reads.

Building the parsers and the schema takes seconds, and a tab key must not; a test compares the table with them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

from hydra._internal.utils import get_args_parser

from macft.cli.commands import COMMANDS, module_of
from macft.completion.candidates import TABLE
from macft.config.reference import allowed, default_config, keys
from macft.config.schema import TrainConfig

_LONGEST_ABOUT = 80
_OF_TRAIN = ("--help", "--cfg", "--multirun", "--config-dir", "--resolve")


def make_table() -> str:
    """The table as JSON."""
    table = {"commands": {name: _command(name) for name in COMMANDS}, "keys": _keys()}
    return json.dumps(table, indent=1, ensure_ascii=False) + "\n"


def _command(name: str) -> dict[str, Any]:
    if name == "train":  # Hydra's parser, of which few options make sense
        made = _parser(get_args_parser())
        made["options"] = {flag: made["options"][flag] for flag in _OF_TRAIN}
        return made
    return _parser(_parser_of(name))


class _Found(BaseException):
    """The parser of a command, when it is about to parse."""

    def __init__(self, parser: argparse.ArgumentParser):
        self.parser = parser


def _parser_of(name: str) -> argparse.ArgumentParser:
    def stop(parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        raise _Found(parser)

    main = importlib.import_module(module_of(name)).main
    with (
        patch.object(argparse.ArgumentParser, "parse_known_args", stop),
        patch.object(argparse.ArgumentParser, "parse_known_intermixed_args", stop),
    ):
        try:
            main([])
        except _Found as found:
            return found.parser
    raise AssertionError(f"macft {name} parses no arguments")


def _parser(parser: argparse.ArgumentParser, about: str = "") -> dict[str, Any]:
    made: dict[str, Any] = {"about": about, "options": {}, "positionals": [], "commands": {}}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            texts = {choice.dest: choice.help or "" for choice in action._choices_actions}
            made["commands"] = {name: _parser(sub, texts.get(name, "")) for name, sub in action.choices.items()}
            continue
        takes = _takes(action)
        choices = [str(choice) for choice in action.choices or ()]
        for flag in action.option_strings:
            if flag.startswith("--"):
                made["options"][flag] = {"about": _short(action, parser), "takes": takes, "choices": choices}
        if not action.option_strings:
            made["positionals"].append({"takes": takes, "choices": choices})
    return made


def _takes(action: argparse.Action) -> str:
    """What a value of the action is; empty where it takes none."""
    if action.nargs == 0:
        return ""
    if action.dest == "overrides":
        return "overrides"
    if action.dest in ("run_folder", "run"):
        return "run"
    is_path = action.type is Path or action.dest in ("model", "dataset", "config_dir")
    return "path" if is_path else "value"


def _short(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    if not isinstance(action.help, str) or action.help == argparse.SUPPRESS:
        return ""
    text = " ".join(parser._get_formatter()._expand_help(action).split())
    return text if len(text) <= _LONGEST_ABOUT else f"{text[: _LONGEST_ABOUT - 3]}..."


def _keys() -> dict[str, Any]:
    config = default_config()
    made = {}
    for key in keys(TrainConfig):
        limit = "true, false" if key.type == "bool" else allowed(config, key.name)
        values = limit.split("; ")[0].split(", ")
        is_list = all(value.replace("_", "").replace("-", "").isalnum() for value in values) and len(values) > 1
        about = key.meaning.split(". ")[0]
        made[key.name] = {
            "about": about if len(about) <= _LONGEST_ABOUT else f"{about[: _LONGEST_ABOUT - 3]}...",
            "allowed": values if is_list and key.type in ("str", "bool", "str or null") else [],
        }
    return made


if __name__ == "__main__":
    TABLE.write_text(make_table(), encoding="utf-8")
    print(TABLE, file=sys.stderr)
