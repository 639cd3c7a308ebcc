"""SSH to the hosts of a cluster, with the user's own configuration, keys and known hosts."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

import asyncssh

from macft.errors import LaunchError, MacftError
from macft.topology.settings import split_destination

_CONNECT_SECONDS = 10.0
_KEEPALIVE_SECONDS = 10.0


async def connect(destination: str) -> asyncssh.SSHClientConnection:
    """Opens a connection to ``[user@]name[:port]``; ``~/.ssh/config``, agent, keys and ``known_hosts`` apply.

    Raises:
        LaunchError: one line with the reason and how to fix it.
    """
    asyncssh.set_log_level(logging.WARNING)  # Hydra prints all logs of level INFO
    user, name, port = split_destination(destination)
    plain = f"{user}@{name}" if user else name
    arguments = f"{'-p ' + str(port) + ' ' if port else ''}{plain}"
    try:
        return await asyncssh.connect(
            name,
            port=port if port is not None else (),
            username=user if user is not None else (),
            connect_timeout=_CONNECT_SECONDS,
            login_timeout=2 * _CONNECT_SECONDS,
            keepalive_interval=_KEEPALIVE_SECONDS,
        )
    except asyncssh.HostKeyNotVerifiable:
        raise LaunchError(
            f"{destination}: its host key is not in known_hosts, or is another one; run `ssh {arguments}` once and "
            "compare the fingerprint with the one that the host shows"
        ) from None
    except asyncssh.PermissionDenied:
        if not any(Path("~/.ssh").expanduser().glob("id_*.pub")) and not os.environ.get("SSH_AUTH_SOCK"):
            raise LaunchError(
                f"{destination}: you have no SSH key; run `ssh-keygen -t ed25519`, then `ssh-copy-id {arguments}`"
            ) from None
        raise LaunchError(f"{destination}: refuses your SSH key; run `ssh-copy-id {arguments}`") from None
    except (TimeoutError, OSError, asyncssh.ConnectionLost, asyncssh.DisconnectError) as error:
        reason = getattr(error, "strerror", None) or str(error) or "no answer"
        raise LaunchError(
            f"{destination}: can't be reached over SSH ({reason}); is it on, and is Remote Login on there "
            "(System Settings > General > Sharing)?"
        ) from None
    except asyncssh.Error as error:
        raise LaunchError(f"{destination}: SSH failed: {error}") from None
    except (ValueError, asyncssh.ConfigParseError) as error:
        raise LaunchError(f"{destination}: your SSH configuration can't be used: {error}") from None


def python_command(python: str) -> str:
    """The path quoted for the remote shell, with ``~`` left unquoted."""
    return "~/" + shlex.quote(python[2:]) if python.startswith("~/") else shlex.quote(python)


def raise_all(results: Sequence[object]) -> None:
    """Raises the errors among ``results`` as one, with a line for each host."""
    errors = [result for result in results if isinstance(result, BaseException)]
    for error in errors:
        if not isinstance(error, MacftError):
            raise error
    if errors:
        raise LaunchError("\n".join(str(error) for error in errors))
