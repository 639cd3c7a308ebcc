"""``python -m macft.fuse RUN_FOLDER``: the adapter fused into its base model, for other programs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from macft.errors import ConfigError
from macft.run.tuned_model import Parser, add_arguments, command, named


def main(argv: Sequence[str]) -> None:
    """Fuses and saves.

    Raises:
        MacftError: anything the user can mend, in one line.
    """
    arguments = _parser().parse_args(argv)
    tuned = named(arguments)
    target = arguments.save_path or (arguments.run_folder / "fused" if arguments.run_folder else Path("fused_model"))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"--save-path: {target} exists already; choose another, or remove it")
    if Path(arguments.gguf_path).name != arguments.gguf_path:
        raise ConfigError(f"--gguf-path: {arguments.gguf_path} must be a file's name; it is written into the save path")

    from macft.device.mlx_device import prepare_device
    from macft.model.merge import as_checkpoint, check_gguf, fuse, save_fused
    from macft.model.resolve import resolve

    source = tuned.whole or resolve(tuned.model)
    if arguments.export_gguf:
        check_gguf(source, dequantize=arguments.dequantize)
    prepare_device()
    loaded = replace(tuned, model=as_checkpoint(tuned.model)).load()
    count = fuse(loaded, dequantize=arguments.dequantize)
    save_fused(target, loaded, gguf_name=arguments.gguf_path if arguments.export_gguf else None)
    what = f"{count} layers fused" if count else "no adapter's layers, the weights themselves were tuned"
    print(f"{target}: {what}; {'quantised' if loaded.is_quantized else str(loaded.dtype).removeprefix('mlx.core.')}")
    if loaded.is_quantized and count:
        print("note: tuned weights were quantised again, which costs some accuracy; --dequantize keeps them exact")
    if arguments.export_gguf:
        print(f"{target / arguments.gguf_path}: GGUF; its vocabulary is written as mlx-lm does, as SentencePiece's")
    print(f'try it: python -m macft.generate --model {target} --prompt "..."')


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m macft.fuse",
        description="Fuses the adapter into its base model. The result loads in mlx-lm, transformers and macft.",
    )
    add_arguments(parser)
    parser.add_argument("--save-path", type=Path, help="the folder to write (default RUN_FOLDER/fused)")
    parser.add_argument("--dequantize", action="store_true", help="write no quantised weights")
    parser.add_argument("--export-gguf", action="store_true", help="write a GGUF file too, float16, for llama.cpp")
    parser.add_argument("--gguf-path", default="ggml-model-f16.gguf", help="its name (default ggml-model-f16.gguf)")
    return parser


if __name__ == "__main__":
    sys.exit(command(main, sys.argv[1:]))
