"""``python -m macft.monitor [RUN_FOLDER]``: shows a run from the files in its folder, at a terminal or on a page."""

from __future__ import annotations

import argparse
import contextlib
import socket
import sys
import time
import webbrowser
from collections.abc import Sequence
from pathlib import Path

import psutil
from rich.console import Console
from rich.live import Live

from macft.cli.parser import Parser, command_parser
from macft.cli.run_command import run_command
from macft.errors import ConfigError
from macft.monitoring.feed import Feed
from macft.monitoring.run_watch import RunWatch
from macft.monitoring.runs import name_of, newest_run, roots_of
from macft.monitoring.terminal import TerminalView
from macft.monitoring.web import MonitorServer, page_path
from macft.network.http_server import is_loopback, new_key, url_of
from macft.report.latest import followed
from macft.report.run_folder import RunFolder

_REFRESH_SECONDS = 1.0
_LOOPBACK = "127.0.0.1"
_PORT = 7080
_ANY_ADDRESS = ("0.0.0.0", "::")


def main(argv: Sequence[str]) -> None:
    """Shows the run until it ends or Ctrl-C is pressed; a page is served until Ctrl-C is pressed.

    Raises:
        ConfigError: The arguments are wrong, or the folder has no metrics file.
        LaunchError: The address of the page can't be listened on.
    """
    options = _parser().parse_args(argv)
    folder = None if options.run_folder is None else followed(options.run_folder)
    if folder is not None and not RunFolder(folder).metrics.is_file():
        path = RunFolder(folder).metrics
        raise ConfigError(f"{path} does not exist; give the folder of a run with report.metrics_file=true")
    if options.web:
        _serve(options, folder)
        return
    values = {"host": options.host, "port": options.port, "open": options.open or None}
    if given := [name for name, value in values.items() if value is not None]:
        raise ConfigError(f"--{given[0]}: is for --web, which serves a page")
    folder = folder or newest_run(Path())
    if folder is None:
        raise ConfigError("no run is below runs/ or multirun/ in this folder; give the folder of a run")
    _show(RunWatch(folder), once=options.once)


def _parser() -> Parser:
    parser = command_parser("monitor")
    parser.add_argument(
        "run_folder",
        type=Path,
        nargs="?",
        help="the run's folder, runs/NAME/TIME or runs/latest (default: the run that began last, below runs/ here)",
    )
    parser.add_argument("--once", action="store_true", help="print the state once and exit")
    page = parser.add_argument_group("a page in the browser")
    page.add_argument("--web", action="store_true", help="serve a page instead, with all runs to choose from")
    page.add_argument(
        "--host",
        help=f"address to serve it at (default {_LOOPBACK}: this machine only; 0.0.0.0: all, with a token)",
    )
    page.add_argument("--port", type=int, help=f"port to serve it at (default {_PORT}; 0: a free one)")
    page.add_argument("--open", action="store_true", help="open it in this machine's browser")
    return parser


def _show(watch: RunWatch, *, once: bool) -> None:
    console = Console(highlight=False)
    if once:
        watch.update()
        console.print(TerminalView(watch.facts()))
        return
    with contextlib.suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        while True:
            watch.update()
            facts = watch.facts()
            live.update(TerminalView(facts), refresh=True)
            if facts.has_ended:
                return
            time.sleep(_REFRESH_SECONDS)


def _serve(options: argparse.Namespace, folder: Path | None) -> None:
    if options.once:
        raise ConfigError("--once: can't be used with --web, which serves a page until Ctrl-C")
    port = _PORT if options.port is None else options.port
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port: {port} is not from 0 to 65535")
    host = options.host or _LOOPBACK
    token = "" if is_loopback(host) else new_key()
    roots = roots_of(folder, Path())
    path = page_path(run="" if folder is None else name_of(folder.absolute(), roots[0]), token=token)
    # Ctrl-C is the usual way to leave it.
    with MonitorServer(Feed(roots), host, port, token) as server, contextlib.suppress(KeyboardInterrupt):
        addresses = [f"{address}{path}" for address in _addresses(server)]
        print(f"the page: {addresses[0]}  (Ctrl-C ends)", flush=True)
        for address in addresses[1:]:
            print(f"      or: {address}", flush=True)
        if token:
            print("other machines can reach it; whoever has the token can see your runs", flush=True)
        if options.open:
            webbrowser.open(addresses[0])
        server.serve_forever(poll_interval=0.1)


def _addresses(server: MonitorServer) -> list[str]:
    """Where browsers find the page: at the address that was asked for, or at all of this machine's."""
    hosts = [server.server_name]
    if server.server_name in _ANY_ADDRESS:
        entries = [entry for each in psutil.net_if_addrs().values() for entry in each]
        hosts = [entry.address for entry in entries if entry.family == socket.AF_INET]
        hosts = sorted(hosts, key=is_loopback)
    return [url_of(host, server.server_port) for host in hosts]


if __name__ == "__main__":
    sys.exit(run_command(main))
