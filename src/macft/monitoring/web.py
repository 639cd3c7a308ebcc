"""The page that shows runs, and the server that sends it and keeps it up to date.

It answers GET only: ``/`` is the page, ``/events`` a stream of server-sent events, each of which is the whole state of
a run. A run is asked for by a name from the server's own list, so no request names a file.
"""

from __future__ import annotations

import contextlib
import io
import logging
import socket
import time
from base64 import b64encode
from functools import cache, partial
from hashlib import sha256
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from macft.monitoring.feed import Feed
from macft.network.http_server import HttpServer, is_key, is_loopback, name_in

_MAX_CONNECTIONS = 64
_MAX_REQUEST_BYTES = 16 * 1024
_REQUEST_SECONDS = 10.0
"""For all of a request, however slowly it comes; and for each part of an answer that a client is to take."""
_LINGER_SECONDS, _LINGER_READS = 0.5, 64
_EVERY_SECONDS = 1.0
_HEARTBEAT_SECONDS = 15.0
_TOO_LARGE = (
    b"HTTP/1.0 431 Request Header Fields Too Large\r\nContent-Type: text/plain\r\n\r\nthe request is too long\n"
)
_log = logging.getLogger("macft.monitor")


class MonitorServer(HttpServer):
    """Serves the page.

    Args:
        feed: Tells how the runs stand.
        host: Where to listen.
        port: 0 takes a free one.
        token: What a client must know; empty: nothing, for a server that only this machine reaches.

    Raises:
        LaunchError: the address can't be listened on.
    """

    def __init__(self, feed: Feed, host: str, port: int, token: str):
        super().__init__(host, port, partial(_PageHandler, feed, token), connections=_MAX_CONNECTIONS)


class _PageHandler(BaseHTTPRequestHandler):
    """Answers one request of one connection."""

    timeout = _REQUEST_SECONDS
    server: MonitorServer

    def __init__(self, feed: Feed, token: str, *arguments: Any):
        self._feed, self._token = feed, token
        super().__init__(*arguments)

    def setup(self) -> None:
        """Reads the request: all of it within a time and a size."""
        super().setup()
        request, deadline = b"", time.monotonic() + _REQUEST_SECONDS
        while b"\r\n\r\n" not in request and b"\n\n" not in request:
            if len(request) >= _MAX_REQUEST_BYTES:
                self._refuse_too_large()
                request = b""
                break
            self.connection.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                data = self.connection.recv(_MAX_REQUEST_BYTES - len(request))
            except OSError:  # too slow, or gone
                data = request = b""
            if not data:
                break
            request += data
        self.connection.settimeout(_REQUEST_SECONDS)
        self.rfile = io.BufferedReader(io.BytesIO(request))

    def _refuse_too_large(self) -> None:
        """Answers, and takes some more of what comes: a connection with unread data would lose the answer."""
        with contextlib.suppress(OSError):
            self.connection.sendall(_TOO_LARGE)
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(_LINGER_SECONDS)
            for _ in range(_LINGER_READS):
                if not self.connection.recv(_MAX_REQUEST_BYTES):
                    return

    def do_GET(self) -> None:
        """Sends the page or the stream."""
        try:
            url = urlsplit(self.path)
            query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        except ValueError:
            self._refuse(HTTPStatus.BAD_REQUEST, "this address can't be read")
            return
        if not self._is_admitted(query.get("token", "")):
            return
        if "token" in query and self._token and url.path == "/":
            self._keep_token(query.get("run", ""))
        elif url.path == "/":
            self._send(HTTPStatus.OK, "text/html; charset=utf-8", _page())
        elif url.path == "/events":
            self._stream(query.get("run", ""))
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "there is nothing here; the page is at /")

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:  # noqa: ARG002
        """Answers a request that is none, in one line."""
        self._refuse(HTTPStatus(code), HTTPStatus(code).phrase)

    def version_string(self) -> str:
        """Tells nothing of versions."""
        return "macft"

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: ARG002
        """Logs a request, without the token that its address may have."""
        _log.debug("%s asked for %s", self.client_address[0], urlsplit(getattr(self, "path", "")).path[:200])

    def _is_admitted(self, given: str) -> bool:
        """Whether this client may see the page; if not, it has been told so.

        A page that a browser on this machine shows can send requests to a server on loopback. Where that page's name
        was made to lead here (DNS rebinding), the name of the host tells.
        """
        name, origin = name_in(self.headers.get("Host", "")), self.headers.get("Origin")
        if is_loopback(str(self.server.server_address[0])) and not is_loopback(name):
            self._refuse(HTTPStatus.FORBIDDEN, "this server answers to localhost only; see --host")
            return False
        if origin is not None and urlsplit(origin).netloc != self.headers.get("Host", ""):
            self._refuse(HTTPStatus.FORBIDDEN, "pages of other servers may not read this one")
            return False
        if self._token and not any(is_key(each, self._token) for each in (given, self._sent(), self._cookie())):
            self._refuse(
                HTTPStatus.UNAUTHORIZED, "the token is missing or wrong; open the address that macft monitor printed"
            )
            return False
        return True

    def _sent(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ").strip()

    def _cookie(self) -> str:
        try:
            morsel = SimpleCookie(self.headers.get("Cookie", "")).get(self._cookie_name)
        except CookieError:
            return ""
        return "" if morsel is None else morsel.value

    @property
    def _cookie_name(self) -> str:
        # Browsers don't keep the cookies of two ports of one host apart.
        return f"macft_monitor_{self.server.server_port}"

    def _keep_token(self, run: str) -> None:
        """Moves the token from the address, which others may see on a screen, to a cookie."""
        self.send_response(HTTPStatus.SEE_OTHER)
        self.send_header("Location", page_path(run=run))
        self.send_header("Set-Cookie", f"{self._cookie_name}={self._token}; Path=/; HttpOnly; SameSite=Lax")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _stream(self, run: str) -> None:
        """Sends how the run stands each time that this changes, until the client goes."""
        self._begin(HTTPStatus.OK, "text/event-stream; charset=utf-8")
        last, sent_at = "", time.monotonic()
        while True:
            data = self._feed.moment(run).data
            self.connection.settimeout(_REQUEST_SECONDS)
            if data != last:
                self.wfile.write(f"data: {data}\n\n".encode())
                last, sent_at = data, time.monotonic()
            elif time.monotonic() - sent_at > _HEARTBEAT_SECONDS:
                self.wfile.write(b": still here\n\n")
                sent_at = time.monotonic()
            self.connection.settimeout(_EVERY_SECONDS)
            try:
                self.connection.recv(1)  # a client says nothing more, so this is its end
                return
            except TimeoutError:
                continue

    def _refuse(self, status: HTTPStatus, text: str) -> None:
        self._send(status, "text/plain; charset=utf-8", f"{text}\n".encode())

    def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self._begin(status, kind, len(body))
        if self.command != "HEAD":
            self.wfile.write(body)

    def _begin(self, status: HTTPStatus, kind: str, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", _policy())
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.end_headers()


def page_path(**query: str) -> str:
    """The path of the page, with those of ``run`` and ``token`` that are not empty."""
    given = urlencode({name: value for name, value in query.items() if value})
    return f"/?{given}" if given else "/"


@cache
def _page() -> bytes:
    return files("macft.monitoring").joinpath("page.html").read_bytes()


@cache
def _policy() -> str:
    """Only the page's own style and script run, and they talk to this server alone."""
    page = _page()
    digests = {}
    for tag in ("style", "script"):
        inner = page.partition(f"<{tag}>".encode())[2].partition(f"</{tag}>".encode())[0]
        digests[tag] = b64encode(sha256(inner).digest()).decode()
    return (
        f"default-src 'none'; style-src 'sha256-{digests['style']}'; script-src 'sha256-{digests['script']}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
