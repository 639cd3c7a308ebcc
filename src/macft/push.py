"""``python -m macft.push RUN_FOLDER --repo USER/NAME``: puts an adapter on the Hugging Face Hub, with a model card."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from macft.api.training_run import TrainingRun
from macft.cli.parser import Parser, command_parser
from macft.cli.run_command import run_command
from macft.errors import ConfigError
from macft.run.tuned_model import find_run, finished_adapter


def main(argv: Sequence[str]) -> None:
    """Uploads the adapter of a run, or its model where all weights were trained.

    Raises:
        ConfigError: the arguments are wrong, the run has no adapter, or nobody is logged in.
        LaunchError: the hub can't be reached, or refuses.
    """
    arguments = _parser().parse_args(argv)

    from macft.publishing.hub import check_repository, push_adapter, push_model
    from macft.publishing.model_card import hub_id, model_card

    folder = find_run(arguments.run_folder)
    run = TrainingRun(folder.path)
    config, summary = run.config, run.summary
    whole = folder.model if folder.model.is_dir() else None
    adapter = finished_adapter(folder) if whole is None else None
    base = hub_id(arguments.model or config.model.path)
    if base is None:
        raise ConfigError(
            f"--model: {arguments.model or config.model.path} is no id of the Hugging Face Hub; "
            "name the base model there, for those who load the adapter"
        )
    if arguments.card:
        print(model_card(arguments.repo, base=base, is_adapter=whole is None, config=config, summary=summary), end="")
        return
    check_repository(arguments.repo, "--repo")
    if adapter is not None:
        address = push_adapter(
            adapter, arguments.repo, base=base, config=config, summary=summary, private=arguments.private
        )
    else:
        assert whole is not None
        address = push_model(
            whole, arguments.repo, base=base, config=config, summary=summary, private=arguments.private
        )
    print(f"{address}: {'adapter' if adapter is not None else 'model'} and model card")


def _parser() -> Parser:
    parser = command_parser("push", epilog="Files of the run other than the adapter are not uploaded.")
    parser.add_argument("run_folder", type=Path, help="a run's folder: its adapter is uploaded")
    parser.add_argument(
        "--repo", required=True, metavar="USER/NAME", help="the repository, which is made if there is none"
    )
    parser.add_argument("--private", action="store_true", help="make the repository private, if it is made")
    parser.add_argument("--model", metavar="ID", help="the base model on the hub, where the run had it in a folder")
    parser.add_argument("--card", action="store_true", help="print the model card, and upload nothing")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
