"""``python -m macft.serve RUN_FOLDER``: answers over HTTP in the form of OpenAI's API."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from macft.cli.parser import Parser, command_parser
from macft.cli.run_command import run_command
from macft.errors import ConfigError, MacftError
from macft.launch.generation.arguments import (
    add_cluster_arguments,
    distributed_model,
    follow_first_host,
    leading_rank,
    topology_of,
)
from macft.run.tuned_model import TunedModel, add_model_arguments
from macft.topology.settings import TopologyConfig

if TYPE_CHECKING:
    from macft.model.load import LoadedModel
    from macft.run.generation.leader import GenerationLeader
    from macft.serving.engine import Engine
    from macft.serving.http_server import Server
    from macft.serving.options import ServerConfig

_KEY_VARIABLE = "MACFT_API_KEY"
_REMEMBERED = 10
"""Conversations whose keys and values a cluster keeps."""


def main(argv: Sequence[str]) -> NoReturn:
    """Serves until Ctrl-C.

    Raises:
        MacftError: The arguments are wrong, the model or adapter can't be read, or the address is in use.
    """
    arguments = _parser().parse_args(argv)
    topology = topology_of(arguments)
    if follow_first_host(topology):
        sys.exit(0)
    tuned = TunedModel.from_arguments(arguments)
    config = _config(arguments, tuned)

    from macft.device.mlx_device import prepare_device
    from macft.serving.http_server import Server

    # Before the model, which may take long to load.
    with Server(config) as server:
        prepare_device()
        status = run_command(
            lambda _: _serve(server, config, lambda: _engine(tuned, config, topology, is_tuned=not arguments.base)),
            [],
            interrupted=lambda: "stopped",
        )
        sys.stdout.flush()
        sys.stderr.flush()
        # Python would wait for a model that is loaded or a long prompt that is computed, and would end the threads of
        # connections within the code of other libraries, which aborts the process. There is nothing to save.
        os._exit(status)


def _serve(server: Server, config: ServerConfig, make_engine: Callable[[], Engine]) -> None:
    """Serves until Ctrl-C, or until the engine can't go on.

    Raises:
        MacftError: The model can't be loaded, or why the engine can't go on.
    """
    engine = make_engine()
    try:
        server.serve(engine, lambda: _announce(config, server.url))
    finally:
        engine.stop()
    if (failure := engine.failure) is not None:
        raise failure if isinstance(failure, MacftError) else MacftError(str(failure))


def _engine(tuned: TunedModel, config: ServerConfig, topology: TopologyConfig | None, *, is_tuned: bool) -> Engine:
    from macft.serving.cluster_engine import ClusterEngine
    from macft.serving.engine import OwnEngine

    if topology is None:
        return OwnEngine(_opened(tuned, is_tuned=is_tuned), config)
    return ClusterEngine(_distributed(tuned, config, topology, is_tuned=is_tuned), config)


@contextmanager
def _opened(tuned: TunedModel, *, is_tuned: bool) -> Iterator[LoadedModel]:
    from macft.model.backends.choose import make_backend

    loaded = tuned.load(tuned=is_tuned)
    with make_backend(loaded.execution.padded()).installed(loaded.model):
        yield loaded


@contextmanager
def _distributed(
    tuned: TunedModel, config: ServerConfig, topology: TopologyConfig, *, is_tuned: bool
) -> Iterator[GenerationLeader]:
    from macft.run.generation.leader import GenerationLeader

    wanted = distributed_model(tuned, is_tuned=is_tuned)
    with leading_rank(topology, tuned) as rank:
        answers = GenerationLeader(rank, wanted, together=config.together, remembered=_REMEMBERED, tell=_tell)
        yield answers
        answers.close()


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _announce(config: ServerConfig, url: str) -> None:
    print(f"{config.name} at {url}/v1  (Ctrl-C ends)", flush=True)


def _config(arguments: argparse.Namespace, tuned: TunedModel) -> ServerConfig:
    from macft.evaluation.chat import Sampling
    from macft.network.http_server import is_loopback, new_key
    from macft.serving.options import ServerConfig

    key = arguments.api_key if arguments.api_key is not None else os.environ.get(_KEY_VARIABLE, "")
    if arguments.api_key == "":
        raise ConfigError("--api-key: is empty")
    is_own = not key and not is_loopback(arguments.host)
    config = ServerConfig(
        name=arguments.name or tuned.name,
        host=arguments.host,
        port=arguments.port,
        api_key=new_key() if is_own else key,
        allowed_origins=tuple(arguments.allowed_origins),
        sampling=Sampling(
            max_tokens=arguments.max_tokens,
            temp=arguments.temp,
            top_p=arguments.top_p,
            min_p=arguments.min_p,
            top_k=arguments.top_k,
        ),
        together=arguments.together,
    )
    if problems := config.problems():
        raise ConfigError("\n".join(problems))
    if is_own:
        print(f"other machines can reach {arguments.host}, so clients need this key: {config.api_key}", flush=True)
    return config


def _parser() -> Parser:
    parser = command_parser("serve", epilog="Paths: /v1/chat/completions, /v1/completions, /v1/models, /health.")
    add_model_arguments(parser)
    add_cluster_arguments(parser)
    parser.add_argument("--base", action="store_true", help="serve the base model without the adapter")
    parser.add_argument("--name", help="the model's name in requests (default: the run's, or the model's)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1: this machine only; 0.0.0.0: all)"
    )
    parser.add_argument("--port", type=int, default=8080, help="port to listen at (default 8080; 0: a free one)")
    parser.add_argument(
        "--api-key",
        help=f"the key that clients must send (default: {_KEY_VARIABLE}, which other users can't see; with another "
        "--host than this machine's, one is made)",
    )
    parser.add_argument(
        "--allowed-origins", nargs="+", default=[], metavar="URL", help="web pages that may use it (default: none)"
    )
    parser.add_argument("--together", type=int, default=32, help="most answers generated at the same time (default 32)")
    defaults = parser.add_argument_group("defaults of a request")
    defaults.add_argument("--max-tokens", "-m", type=int, default=512, help="longest answer (default 512)")
    defaults.add_argument("--temp", type=float, default=0.0, help="temperature (default 0)")
    defaults.add_argument("--top-p", type=float, default=1.0, help="nucleus sampling (default 1: off)")
    defaults.add_argument("--min-p", type=float, default=0.0, help="smallest relative probability (default 0)")
    defaults.add_argument("--top-k", type=int, default=0, help="the k most likely tokens (default 0: all)")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
