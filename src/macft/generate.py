"""``python -m macft.generate RUN_FOLDER``: asks the tuned model one question, or chats with it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from typing import TYPE_CHECKING

from macft.api.loaded_model import load_found
from macft.cli.parser import Parser, command_parser
from macft.cli.run_command import run_command
from macft.errors import ConfigError
from macft.launch.generation.arguments import (
    add_cluster_arguments,
    distributed_model,
    follow_first_host,
    leading_rank,
    topology_of,
)
from macft.report.shown_phases import ShownPhases
from macft.run.tuned_model import TunedModel, add_model_arguments
from macft.topology.settings import TopologyConfig

if TYPE_CHECKING:
    from macft.evaluation.chat import Chat, Sampling

_HELP = "q ends the chat, r starts a new one, h shows this; Ctrl-C stops an answer"


def main(argv: Sequence[str]) -> None:
    """Answers ``--prompt``, or each line of a chat.

    Raises:
        MacftError: The arguments are wrong, or the model or adapter can't be read.
    """
    arguments = _parser().parse_args(argv)
    topology = topology_of(arguments)
    if follow_first_host(topology):
        return
    tuned = TunedModel.from_arguments(arguments)
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    if prompt is not None and not prompt.strip():
        raise ConfigError("--prompt: is empty; leave it out to chat")

    from macft.evaluation.chat import Sampling, seed_problems

    sampling = {field.name: getattr(arguments, field.name) for field in fields(Sampling)}
    if problems := Sampling(**sampling).problems() + seed_problems(arguments.seed):
        raise ConfigError("\n".join(problems))
    chosen = Sampling(**sampling)
    opened = _here(tuned, arguments, chosen) if topology is None else _on_cluster(tuned, arguments, chosen, topology)
    with opened as chat:
        if prompt is not None:
            _answer(chat, prompt, verbose=arguments.verbose)
        else:
            _converse(chat, verbose=arguments.verbose)


@contextmanager
def _here(tuned: TunedModel, arguments: argparse.Namespace, sampling: Sampling) -> Iterator[Chat]:
    """A conversation with the model in this process."""
    with ShownPhases() as phases:
        if arguments.verbose:
            phases.begin(f"loading the model {tuned.whole or tuned.model.path}")
        loaded = load_found(tuned, tuned=not arguments.base)
    with loaded as model:
        yield model.chat(
            system_prompt=arguments.system_prompt,
            template=not arguments.ignore_chat_template,
            seed=arguments.seed,
            stop_tokens=tuple(arguments.extra_eos_token),
            **asdict(sampling),
        )


@contextmanager
def _on_cluster(
    tuned: TunedModel, arguments: argparse.Namespace, sampling: Sampling, topology: TopologyConfig
) -> Iterator[Chat]:
    """A conversation with the model on the machines of ``topology``."""
    from macft.device.mlx_device import prepare_device
    from macft.evaluation.chat import Chat, add_stop_tokens
    from macft.run.generation.leader import ClusterConversation, GenerationLeader

    def tell(line: str) -> None:
        if arguments.verbose:
            print(line, file=sys.stderr, flush=True)

    prepare_device()
    with leading_rank(topology, tuned) as rank:
        wanted = distributed_model(tuned, is_tuned=not arguments.base)
        answers = GenerationLeader(rank, wanted, together=1, remembered=1, tell=tell)
        add_stop_tokens(answers.tokenizer, arguments.extra_eos_token)
        source = ClusterConversation(answers, sampling, arguments.seed)
        yield Chat(
            source,
            answers.tokenizer,
            system_prompt=arguments.system_prompt,
            template=not arguments.ignore_chat_template,
        )
        answers.close()


def _converse(chat: Chat, *, verbose: bool) -> None:
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        import readline  # noqa: F401  (input() then has history and editing)

        print(_HELP, file=sys.stderr)
    while True:
        try:
            text = input(">> " if is_terminal else "").strip()
        except EOFError:
            return
        match text:
            case "":
                continue
            case "q":
                return
            case "r":
                chat.reset()
            case "h":
                print(_HELP)
            case _:
                _answer(chat, text, verbose=verbose)


def _answer(chat: Chat, text: str, *, verbose: bool) -> None:
    parts = chat.say(text)
    is_stopped = False
    try:
        for part in parts:
            print(part, end="", flush=True)
    except KeyboardInterrupt:
        is_stopped = True
    parts.close()
    print(" ... (stopped)" if is_stopped else "", flush=True)
    if verbose and chat.speed is not None:
        speed = chat.speed
        print(
            f"prompt {speed.prompt_tokens} tokens, {speed.prompt_rate:.1f} tokens/s; "
            f"answer {speed.answer_tokens} tokens, {speed.answer_rate:.1f} tokens/s",
            file=sys.stderr,
        )


def _parser() -> Parser:
    parser = command_parser("generate", epilog=f"The answer goes to standard output. In a chat: {_HELP}.")
    add_model_arguments(parser)
    add_cluster_arguments(parser)
    parser.add_argument("--prompt", "-p", help="answer this and exit; - reads it from standard input")
    parser.add_argument("--base", action="store_true", help="use the base model without the adapter, to compare")
    parser.add_argument("--system-prompt", help="the system message of the conversation")
    parser.add_argument("--max-tokens", "-m", type=int, default=256, help="longest answer (default 256; -1: no limit)")
    parser.add_argument("--temp", type=float, default=0.0, help="temperature (default 0: always the most likely token)")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus sampling (default 1: off)")
    parser.add_argument(
        "--min-p", type=float, default=0.0, help="smallest probability, relative to the most likely token's"
    )
    parser.add_argument("--top-k", type=int, default=0, help="sample from the k most likely tokens (default 0: all)")
    parser.add_argument("--min-tokens-to-keep", type=int, default=1, help="tokens that --min-p must leave (default 1)")
    parser.add_argument("--xtc-probability", type=float, default=0.0, help="how often XTC sampling is used (default 0)")
    parser.add_argument("--xtc-threshold", type=float, default=0.1, help="probability above which XTC cuts")
    parser.add_argument("--max-kv-size", type=int, help="number of tokens of the conversation to keep in memory")
    parser.add_argument("--seed", type=int, help="random seed of the sampling, to get the same answer again")
    parser.add_argument(
        "--extra-eos-token", nargs="+", default=[], metavar="TOKEN", help="more tokens that end an answer"
    )
    parser.add_argument(
        "--ignore-chat-template", action="store_true", help="give the model the text without its chat template"
    )
    parser.add_argument(
        "--verbose",
        type=_truth,
        default=True,
        metavar="True|False",
        help="token counts and speed on standard error (default True)",
    )
    return parser


def _truth(text: str) -> bool:
    if text.lower() in ("true", "t", "1", "yes"):
        return True
    if text.lower() in ("false", "f", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"'{text}' is neither True nor False")


if __name__ == "__main__":
    sys.exit(run_command(main))
