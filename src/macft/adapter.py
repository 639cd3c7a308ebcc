"""``python -m macft.adapter export|import``: converts adapters to and from the format of Hugging Face's PEFT."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from macft.cli.parser import Parser, command_parser
from macft.cli.run_command import run_command
from macft.cli.shell import command
from macft.config.yaml import read
from macft.device.durable import new_folder
from macft.errors import ConfigError
from macft.run.tuned_model import find_run, finished_adapter


def main(argv: Sequence[str]) -> None:
    """Converts one adapter.

    Raises:
        MacftError: The arguments are wrong, the adapter can't be read or has no equivalent in the other format.
    """
    arguments = _parser().parse_args(argv)
    target: Path = arguments.save_path
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"--save-path: {target} exists already; choose another, or remove it")
    if arguments.command == "export":
        _export(arguments, target)
    else:
        _import(arguments.peft_folder, target)


def _export(arguments: argparse.Namespace, target: Path) -> None:
    alpha, rslora, trained = None, False, ""
    if arguments.adapter_path is not None:
        source: Path = arguments.adapter_path
    elif arguments.run_folder is not None:
        folder = find_run(arguments.run_folder)
        config = read(folder.config)
        source = finished_adapter(folder)
        alpha, rslora, trained = config.adapter.alpha, config.adapter.rslora, config.model.path
    else:
        raise ConfigError("RUN_FOLDER: name a run's folder, or an adapter by --adapter-path")

    from macft.model.adapters.attach import read_adapter_config
    from macft.model.adapters.peft import export_peft
    from macft.model.fetch.local import find_local

    trained = trained or str(read_adapter_config(source).get("model", ""))
    model = arguments.model or trained
    local = [find_local(name) for name in (model, trained) if name]
    base = next((found for found in local if found and any(found.glob("model*.safetensors"))), None)
    with new_folder(target) as written:
        description = export_peft(source, written, base_model=model, base=base, alpha=alpha, rslora=rslora)
    print(f"{target}: {description}, in PEFT's format, for {model or 'an unnamed base model (--model names it)'}")
    if base is None:
        print(
            "the layers have mlx-lm's names: the base model is not on this machine, to see what transformers calls them"
        )


def _import(source: Path, target: Path) -> None:
    from macft.model.adapters.peft import import_peft

    with new_folder(target) as written:
        description = import_peft(source, written)
    print(f"{target}: {description}, in mlx-lm's format")
    print(f'try it: {command("python", "-m", "macft.generate", "--adapter-path", target)} --prompt "..."')


def _parser() -> Parser:
    parser = command_parser(
        "adapter",
        epilog="export RUN_FOLDER|--adapter-path FOLDER --save-path FOLDER [--format peft] [--model NAME]; "
        "import PEFT_FOLDER --save-path FOLDER",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="export|import")
    out = commands.add_parser(
        "export", help="write a run's adapter for PEFT", description="Writes an adapter for PEFT."
    )
    out.add_argument("run_folder", nargs="?", type=Path, help="a run's folder: its adapter is converted")
    out.add_argument("--adapter-path", type=Path, help="an adapter's folder, in mlx-lm's format, instead")
    out.add_argument("--model", help="the base model's name to write, for instance a Hugging Face id")
    out.add_argument("--format", choices=["peft"], default="peft", help="the format to write")
    back = commands.add_parser(
        "import", help="read a PEFT adapter", description="Writes a PEFT adapter in mlx-lm's format."
    )
    back.add_argument("peft_folder", type=Path, help="a folder with adapter_config.json and adapter_model.safetensors")
    for each in (out, back):
        each.add_argument("--save-path", type=Path, required=True, help="the folder to write")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
