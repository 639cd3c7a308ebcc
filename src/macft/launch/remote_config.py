"""A run's configuration on the hosts of ``topology=ssh``, and on the machine at whose terminal it was started."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path, PurePosixPath

import asyncssh

from macft.device.durable import write_atomically
from macft.errors import LaunchError
from macft.remote.shipment import fetch
from macft.report.latest import point_to
from macft.report.run_folder import RunFolder


async def send_config(
    connection: asyncssh.SSHClientConnection, folder: str, config: str, *, may_exist: bool = False
) -> None:
    """Stores ``config``, a YAML text, in the run's ``folder`` on a host, as proposed.

    ``may_exist`` tells that a run may be in that folder.

    Raises:
        LaunchError: it can't be stored, or another run is in the folder.
    """
    files = RunFolder(Path(folder))
    try:
        async with connection.start_sftp_client() as sftp:
            if not may_exist and await sftp.exists(str(files.config)):
                raise LaunchError(
                    f"{folder} holds another run; give another hydra.run.dir, or replace that run by "
                    "report.overwrite=true"
                )
            await sftp.makedirs(folder, exist_ok=True)
            partial = f"{files.proposed}.partial"
            async with sftp.open(partial, "w", encoding="utf-8") as file:
                await file.write(config)
            await sftp.posix_rename(partial, str(files.proposed))
    except (asyncssh.SFTPError, asyncssh.ChannelOpenError) as error:
        raise LaunchError(f"can't store the run's configuration in {folder}: {error}") from None


@asynccontextmanager
async def own_config(
    folder: Path, own: str, sent: str, connections: Sequence[asyncssh.SSHClientConnection], remote_folder: str
) -> AsyncIterator[None]:
    """Writes this machine's ``config.yaml``, with which the run can go on after this terminal was closed.

    If the run has not begun on any host at the end, the old file is put back; else it is then ``runs/latest`` here.

    Args:
        folder: The run's on this machine.
        own: The text, with the paths of this machine.
        sent: The one that a host writes when the run begins there.
        connections: To the hosts.
        remote_folder: The run's on the hosts.
    """
    files = RunFolder(folder)
    before = files.config.read_bytes() if files.config.exists() else None
    files.create()
    write_atomically(files.config, own)
    try:
        yield
    finally:
        path = str(PurePosixPath(remote_folder) / files.config.name)
        answers = [answer for each in connections if (answer := await _content(each, path)) is not None]
        if answers and sent not in answers:
            files.config.unlink() if before is None else write_atomically(files.config, before)
        else:
            point_to(folder)


async def fetch_results(connection: asyncssh.SSHClientConnection, source: str, folder: Path) -> None:
    """Copies the run's folder ``source`` of a host over ``folder``, which keeps its own ``config.yaml``.

    Raises:
        LaunchError: it cannot be read there or stored here.
    """
    await fetch(connection, source, folder, without=RunFolder(folder).config.name)


def name_base_model(adapter: Path, model: str) -> None:
    """Writes ``model``, a path or a name, into the folder ``adapter``, which may have come from another machine."""
    file = adapter / "adapter_config.json"
    if file.is_file():
        settings = json.loads(file.read_text(encoding="utf-8"))
        write_atomically(file, json.dumps({**settings, "model": model}, indent=4) + "\n")


async def _content(connection: asyncssh.SSHClientConnection, path: str) -> str | None:
    """The text of a file, empty if there is none; None where the host can't be asked."""
    with contextlib.suppress(asyncssh.Error, OSError):
        async with connection.start_sftp_client() as sftp:
            try:
                async with sftp.open(path, "r", encoding="utf-8") as file:
                    return str(await file.read())
            except asyncssh.SFTPNoSuchFile:
                return ""
    return None
