"""``python -m macft.fuse RUN_FOLDER``: merges the adapter into its base model, for other programs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from macft.api.training_run import TrainingRun
from macft.cli.parser import Parser, command_parser
from macft.cli.run_command import run_command
from macft.cli.shell import command
from macft.device.durable import new_folder
from macft.errors import ConfigError
from macft.publishing.gguf_types import GGUF_TYPES
from macft.report.latest import followed
from macft.report.shown_phases import ShownPhases
from macft.run.tuned_model import TunedModel, add_model_arguments

if TYPE_CHECKING:
    from macft.model.load import LoadedModel


def main(argv: Sequence[str]) -> None:
    """Fuses and saves.

    Raises:
        MacftError: The arguments are wrong, the model or adapter can't be read, or the result can't be written.
    """
    arguments = _parser().parse_args(argv)
    if arguments.run_folder is not None:
        arguments.run_folder = followed(arguments.run_folder.expanduser())
    tuned = TunedModel.from_arguments(arguments)
    target = arguments.save_path or (arguments.run_folder / "fused" if arguments.run_folder else Path("fused_model"))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"--save-path: {target} exists already; choose another, or remove it")
    # Either option says what is wanted too.
    gguf = arguments.export_gguf or arguments.gguf_type is not None or arguments.gguf_path is not None
    gguf_type = arguments.gguf_type or "f16"
    gguf_name = arguments.gguf_path or f"ggml-model-{gguf_type}.gguf"
    if Path(gguf_name).name != gguf_name:
        raise ConfigError(f"--gguf-path: {gguf_name} must be a file name; the file is written into the save path")

    if arguments.upload_repo is not None:
        from macft.publishing.hub import check_repository

        check_repository(arguments.upload_repo, "--upload-repo")

    loaded, count = _write(
        tuned, target, dequantize=arguments.dequantize, gguf=(gguf_name, gguf_type) if gguf else None
    )
    what = f"{count} layers fused" if count else "no adapter layers to fuse, all weights were trained"
    print(f"{target}: {what}; {'quantised' if loaded.is_quantized else str(loaded.dtype).removeprefix('mlx.core.')}")
    if loaded.is_quantized and count:
        print("note: the fused weights were quantised again, which loses some accuracy; --dequantize avoids this")
    if gguf:
        print(f"{target / gguf_name}: GGUF for llama.cpp, Ollama and LM Studio; {gguf_type}")
        print(f"with Ollama: {command('ollama', 'create', target.resolve().name, '-f', target / 'Modelfile')}")
    print(f'try it: {command("python", "-m", "macft.generate", "--model", target)} --prompt "..."')
    if arguments.upload_repo is not None:
        from macft.publishing.hub import push_model
        from macft.publishing.model_card import hub_id

        base = hub_id(tuned.model.path)
        summary = TrainingRun(arguments.run_folder).summary if arguments.run_folder else {}
        address = push_model(
            target, arguments.upload_repo, base=base, config=tuned.run, summary=summary, private=arguments.private
        )
        print(f"{address}: model and model card")


def _write(
    tuned: TunedModel, target: Path, *, dequantize: bool, gguf: tuple[str, str] | None
) -> tuple[LoadedModel, int]:
    """Writes the fused model to ``target``; returns it with the number of layers that were fused.

    ``gguf`` is the name of a GGUF file to write as well, and the type of its weights.
    """
    with ShownPhases() as phases:
        phases.begin(f"loading the model {tuned.whole or tuned.model.path}")
        from macft.device.mlx_device import prepare_device
        from macft.model.adapters.fuse import as_checkpoint, fuse, save_fused
        from macft.model.fetch.resolve import resolve
        from macft.model.load import load
        from macft.model.settings import ModelConfig
        from macft.publishing.gguf_model import check_gguf, write_gguf
        from macft.publishing.modelfile import modelfile

        source = tuned.whole or resolve(tuned.model)
        if gguf is not None:
            check_gguf(source)
        prepare_device()
        loaded = replace(tuned, model=as_checkpoint(tuned.model)).load(is_lazy=True)
        phases.begin("fusing")
        count = fuse(loaded, dequantize=dequantize)
        with new_folder(target) as folder:
            phases.begin(f"writing {target}")
            save_fused(folder, loaded)
            if gguf is not None:
                file, kind = gguf
                phases.begin(f"writing {target / file}")
                settings = ModelConfig(
                    path=str(folder),
                    precision="checkpoint",
                    quantization="keep",
                    trust_remote_code=tuned.model.trust_remote_code,
                )
                written = load(settings, folder, is_lazy=True)
                write_gguf(folder / file, written, folder, kind=kind, name=target.resolve().name)
                (folder / "Modelfile").write_text(modelfile(file, loaded.tokenizer), encoding="utf-8")
    return loaded, count


def _parser() -> Parser:
    parser = command_parser("fuse", epilog="The result loads in mlx-lm, transformers and macft.")
    add_model_arguments(parser)
    parser.add_argument("--save-path", type=Path, help="the folder to write (default RUN_FOLDER/fused)")
    parser.add_argument("--dequantize", action="store_true", help="write unquantised weights")
    parser.add_argument("--upload-repo", metavar="USER/NAME", help="also put the result on the Hugging Face Hub")
    parser.add_argument("--private", action="store_true", help="make that repository private, if it is made")
    parser.add_argument("--export-gguf", action="store_true", help="also write a GGUF file, for llama.cpp and Ollama")
    parser.add_argument(
        "--gguf-type", choices=GGUF_TYPES, help="type of its weights (default f16); q8_0 is half as large"
    )
    parser.add_argument("--gguf-path", help="its name (default ggml-model-TYPE.gguf)")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
