"""``python -m macft.generate RUN_FOLDER``: ask the tuned model one question, or chat with it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from macft.errors import ConfigError
from macft.run.tuned_model import Parser, add_arguments, command, named

if TYPE_CHECKING:
    from macft.evaluation.chat import Chat

_HELP = "q ends the chat, r begins a new one, h shows this; Ctrl-C cuts an answer short"


def main(argv: Sequence[str]) -> None:
    """Answers ``--prompt``, or each line of a chat.

    Raises:
        MacftError: anything the user can mend, in one line.
    """
    arguments = _parser().parse_args(argv)
    tuned = named(arguments)
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    if prompt is not None and not prompt.strip():
        raise ConfigError("--prompt: is empty; leave it out to chat")

    import mlx.core as mx

    from macft.device.mlx_device import prepare_device
    from macft.evaluation.chat import Chat, Sampling
    from macft.model.backends.choose import make_backend

    sampling = Sampling(**{field.name: getattr(arguments, field.name) for field in fields(Sampling)})
    if found := sampling.problems():
        raise ConfigError("\n".join(found))
    prepare_device()
    loaded = tuned.load(tuned=not arguments.base)
    for token in arguments.extra_eos_token:
        loaded.tokenizer.add_eos_token(token)
    if arguments.seed is not None:
        mx.random.seed(arguments.seed)
    chat = Chat(
        loaded.model,
        loaded.tokenizer,
        sampling,
        system_prompt=arguments.system_prompt,
        template=not arguments.ignore_chat_template,
    )
    with make_backend(loaded.execution.padded()).installed(loaded.model):
        if prompt is not None:
            _answer(chat, prompt, verbose=arguments.verbose)
        else:
            _converse(chat, verbose=arguments.verbose)


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
    cut = False
    try:
        for part in parts:
            print(part, end="", flush=True)
    except KeyboardInterrupt:
        cut = True
    parts.close()  # type: ignore[attr-defined]
    print(" ... (cut short)" if cut else "", flush=True)
    if verbose and chat.speed is not None:
        speed = chat.speed
        print(
            f"prompt {speed.prompt_tokens} tokens, {speed.prompt_rate:.1f} tokens/s; "
            f"answer {speed.answer_tokens} tokens, {speed.answer_rate:.1f} tokens/s",
            file=sys.stderr,
        )


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m macft.generate",
        description="Answers --prompt, or chats, with the model a run has tuned. The answer goes to standard output.",
        epilog=f"In a chat: {_HELP}.",
    )
    add_arguments(parser)
    parser.add_argument("--prompt", "-p", help="answer this and end; - reads it from standard input")
    parser.add_argument("--base", action="store_true", help="leave the adapter out, to compare")
    parser.add_argument("--system-prompt", help="the system message of the conversation")
    parser.add_argument("--max-tokens", "-m", type=int, default=256, help="longest answer (default 256; -1: no limit)")
    parser.add_argument("--temp", type=float, default=0.0, help="temperature (default 0: always the likeliest token)")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus sampling (default 1: off)")
    parser.add_argument("--min-p", type=float, default=0.0, help="least probability, relative to the likeliest token's")
    parser.add_argument("--top-k", type=int, default=0, help="sample from the k likeliest tokens (default 0: all)")
    parser.add_argument("--min-tokens-to-keep", type=int, default=1, help="tokens that --min-p must leave (default 1)")
    parser.add_argument("--xtc-probability", type=float, default=0.0, help="how often XTC sampling is used (default 0)")
    parser.add_argument("--xtc-threshold", type=float, default=0.1, help="probability above which XTC cuts")
    parser.add_argument("--max-kv-size", type=int, help="keep so many tokens of the conversation in memory")
    parser.add_argument("--seed", type=int, help="of the sampling, for the same answer again")
    parser.add_argument("--extra-eos-token", nargs="+", default=[], metavar="TOKEN", help="further tokens that end it")
    parser.add_argument("--ignore-chat-template", action="store_true", help="give the model the bare text")
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
    sys.exit(command(main, sys.argv[1:]))
