"""What a server is told at its start."""

from __future__ import annotations

from dataclasses import dataclass

from macft.evaluation.chat import Sampling

MAX_BODY_BYTES = 8 * 2**20
"""Largest request; about two million tokens of text."""


@dataclass(frozen=True)
class ServerConfig:
    """Where a server listens, whom it answers, and what a request that doesn't say otherwise gets.

    Attributes:
        name: Of the model, in requests and in ``/v1/models``.
        host: Address or name to listen at.
        port: 0 takes a free one.
        api_key: That clients must send; empty: none is needed.
        allowed_origins: Web pages that may use the server, as ``https://example.org``; ``*`` is any page.
        sampling: Defaults of a request.
        together: Most answers that are generated at the same time.
    """

    name: str
    host: str
    port: int
    api_key: str
    allowed_origins: tuple[str, ...]
    sampling: Sampling
    together: int

    def problems(self) -> list[str]:
        """One line for each invalid value."""
        lines = []
        if not 0 <= self.port <= 65535:
            lines.append(f"--port: {self.port} is not from 0 to 65535")
        if not self.name.strip() or not self.name.isprintable():
            lines.append("--name: must be a printable text")
        if self.api_key and not (self.api_key.isascii() and self.api_key.isprintable() and " " not in self.api_key):
            lines.append("--api-key: must be printable ASCII characters without spaces")
        if self.together < 1:
            lines.append(f"--together: {self.together} must be 1 or more")
        if self.sampling.max_tokens == -1:  # which requests may not ask for either
            lines.append("--max-tokens: -1 must be 1 or more; a server's answers have a limit")
        return lines + self.sampling.problems()
