"""Whether this machine can log in to others over SSH."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from macft.errors import LaunchError
from macft.remote.connection import connect


def closed_to_ssh(destinations: Sequence[str]) -> list[str]:
    """A line for each of ``destinations`` that can't be used, with the reason and how to fix it."""

    async def attempt(destination: str) -> str:
        try:
            connection = await connect(destination)
        except LaunchError as error:
            return str(error)
        connection.close()
        return ""

    async def attempt_all() -> list[str]:
        return await asyncio.gather(*(attempt(destination) for destination in destinations))

    return [problem for problem in asyncio.run(attempt_all()) if problem]
