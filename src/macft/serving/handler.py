"""One HTTP request: who may ask, what may be asked, and errors in OpenAI's form.

Answers, streams, tool calls and thinking are written by mlx-lm's handler. It would also load any model that a request
names, and fetch any address; so a request is checked, and reduced to what this server offers, before mlx-lm sees it.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import select
import socket
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any

from mlx_lm.server import APIHandler

from macft.data.conversation import conversation
from macft.errors import DataError
from macft.network.http_server import is_key, is_loopback, name_in
from macft.serving.engine import Engine, status_of
from macft.serving.options import MAX_BODY_BYTES, ServerConfig
from macft.serving.parameters import settle

_COMPLETIONS = ("/v1/chat/completions", "/chat/completions", "/v1/completions")
_MODELS = "/v1/models"
_IDLE_SECONDS = 60.0
# Keys by which mlx-lm would load something else.
_NOT_OFFERED = ("adapters", "draft_model", "num_draft_tokens")
_log = logging.getLogger("macft.serving")


class RequestRefused(BaseException):
    """Ends a request with an error. Not an ``Exception``, which mlx-lm's handler would answer in its own way."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Handler(APIHandler):
    """Answers one connection.

    Args:
        engine: Generates.
        config: Of the server.
    """

    timeout = _IDLE_SECONDS
    protocol_version = "HTTP/1.0"
    path: str

    def __init__(self, engine: Engine, config: ServerConfig, *arguments: Any, **named: Any):
        self._config = config
        super().__init__(_ForOneClient(engine, self._is_gone), *arguments, **named)

    def do_POST(self) -> None:
        """Answers a completion."""
        self._answer(self._complete)

    def do_GET(self) -> None:
        """Answers ``/v1/models`` and ``/health``."""
        self._answer(self._show)

    def do_OPTIONS(self) -> None:
        """Answers a browser that asks what it may do."""
        self._answer(lambda: super(Handler, self).do_OPTIONS(), needs_key=False)

    def handle_models_request(self) -> None:
        """The one model of this server."""
        name = self._config.name
        model = {"id": name, "object": "model", "created": self.created, "owned_by": "macft"}
        if self.path == _MODELS:
            self._send({"object": "list", "data": [model]})
        elif self.path == f"{_MODELS}/{name}":
            self._send(model)
        else:
            raise self._no_such_model(self.path.removeprefix(f"{_MODELS}/"))

    def completion_usage_response(self, *counts: Any) -> dict[str, Any]:
        """The last event of a stream, for a client that asked for the numbers of tokens."""
        return {**super().completion_usage_response(*counts), "object": self.object_type}

    def validate_model_parameters(self) -> None:
        """Raises RequestRefused for a parameter that can't be used."""
        try:
            super().validate_model_parameters()
            problem = settle(self, self.response_generator.model_provider.vocabulary)
        except (ValueError, TypeError, OverflowError) as error:
            problem = str(error)
        if problem:
            raise RequestRefused(HTTPStatus.BAD_REQUEST, problem)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Logs a request."""
        _log.info("%s %s", self.address_string(), format % arguments)

    def address_string(self) -> str:
        """The client's address."""
        return str(self.client_address[0])

    def _set_cors_headers(self) -> None:
        if self._config.allowed_origins:  # otherwise a browser lets no page read an answer
            super()._set_cors_headers()

    def _answer(self, answer: Callable[[], None], *, needs_key: bool = True) -> None:
        try:
            self._admit(needs_key=needs_key and self.path != "/health")
            answer()
        except (RequestRefused, DataError) as refused:
            self._refuse(getattr(refused, "status", HTTPStatus.BAD_REQUEST), str(refused))
        except (ConnectionError, TimeoutError):
            _log.info("%s went away", self.address_string())
        except Exception as error:  # of the model, while it answered
            _log.exception("a request failed")
            self._refuse(status_of(error), " ".join(str(error).split()) or type(error).__name__)

    def _admit(self, *, needs_key: bool) -> None:
        """Refuses a client without the key, and a web page that isn't allowed to use this server.

        A page that a browser on this machine shows can send requests to a server on loopback. Its origin tells; where
        its own name was made to lead here (DNS rebinding), the name of the host does.
        """
        config, origin = self._config, self.headers.get("Origin")
        if origin is not None and not {"*", origin} & set(config.allowed_origins):
            raise RequestRefused(
                HTTPStatus.FORBIDDEN, f"pages of {origin} may not use this server; see --allowed-origins"
            )
        host = self.headers.get("Host", "")
        name = name_in(host)
        if is_loopback(config.host) and host and not is_loopback(name):
            raise RequestRefused(HTTPStatus.FORBIDDEN, f"this server answers to localhost, not to {name}; see --host")
        if config.api_key and needs_key:
            sent = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
            if not is_key(sent, config.api_key):
                raise RequestRefused(
                    HTTPStatus.UNAUTHORIZED, "the key is missing or wrong; send Authorization: Bearer KEY"
                )

    def _show(self) -> None:
        self.path = self.path.partition("?")[0]
        if self.path == "/health" or self.path == _MODELS or self.path.startswith(f"{_MODELS}/"):
            super().do_GET()
        else:
            raise self._no_such_path()

    def _complete(self) -> None:
        self.path = self.path.partition("?")[0]
        if self.path not in _COMPLETIONS:
            raise self._no_such_path()
        body = self._body()
        model = body.get("model", self._config.name)
        if model not in (self._config.name, "default_model"):
            raise self._no_such_model(model)
        for key in _NOT_OFFERED:
            if body.pop(key, None) is not None:
                raise RequestRefused(HTTPStatus.BAD_REQUEST, f"`{key}`: this server has one model, as it was started")
        body["model"] = self._config.name
        # Clients write null for what they don't set; and mlx-lm tells 0 from 0.0 here.
        body = {key: value for key, value in body.items() if value is not None}
        for key in ("xtc_probability", "xtc_threshold"):
            if isinstance(body.get(key), int) and not isinstance(body[key], bool):
                body[key] = float(body[key])
        _check_rest(body)
        if self.path == "/v1/completions":
            if not isinstance(body.get("prompt"), str) or not body["prompt"]:
                raise RequestRefused(HTTPStatus.BAD_REQUEST, "`prompt` must be a text that is not empty")
        else:
            form = conversation(body.get("messages"), body.get("tools"), "`messages`")
            body |= {"messages": list(form.messages), "tools": form.tools}
        encoded = json.dumps(body).encode()
        self.headers.replace_header("Content-Length", str(len(encoded)))
        self.rfile = io.BytesIO(encoded)
        super().do_POST()

    def _body(self) -> dict[str, Any]:
        kind = self.headers.get_content_type()
        if "Content-Type" in self.headers and kind != "application/json":
            raise RequestRefused(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"send JSON (Content-Type: application/json), not {kind}"
            )
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal()):
            raise RequestRefused(HTTPStatus.LENGTH_REQUIRED, "a request needs a Content-Length")
        if len(length) > 12 or int(length) > MAX_BODY_BYTES:
            limit = f"{MAX_BODY_BYTES // 2**20} MiB"
            raise RequestRefused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a request may have {limit}, and this one is larger"
            )
        data = self.rfile.read(int(length))
        if len(data) < int(length):
            raise ConnectionResetError("the client went away within its request")
        try:
            body = json.loads(data)
            json.dumps(body, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # half of a pair of surrogates, which no tokenizer takes
            raise RequestRefused(HTTPStatus.BAD_REQUEST, "the request has text that is not Unicode") from None
        except (ValueError, RecursionError) as error:
            raise RequestRefused(HTTPStatus.BAD_REQUEST, f"the request is not JSON: {error}") from None
        if not isinstance(body, dict):
            raise RequestRefused(HTTPStatus.BAD_REQUEST, "the request must be a JSON object")
        return body

    def _send(self, answer: dict[str, Any], status: int = HTTPStatus.OK) -> None:
        encoded = json.dumps(answer).encode()
        self._set_completion_headers(status)
        self.send_header("Content-Length", str(len(encoded)))
        self.end_headers()
        self.wfile.write(encoded)

    def _refuse(self, status: int, message: str) -> None:
        """Sends an error, as the last event of a stream that has begun."""
        kind = "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
        error = {"error": {"message": message, "type": kind, "param": None, "code": None}}
        with contextlib.suppress(OSError):
            if self._is_under_way:
                self.wfile.write(f"data: {json.dumps(error)}\n\n".encode())
                return
            self._headers_buffer: list[bytes] = []  # of an answer that was about to begin
            self._send(error, status)

    def end_headers(self) -> None:
        """Sends the status and the headers."""
        self._is_under_way = True
        super().end_headers()

    _is_under_way = False

    def _is_gone(self) -> bool:
        """Whether the client has closed its connection."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        try:
            return bool(readable) and self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except OSError:
            return True

    def _no_such_path(self) -> RequestRefused:
        return RequestRefused(
            HTTPStatus.NOT_FOUND,
            f"there is no {self.path}; there are {', '.join(_COMPLETIONS[::2])}, {_MODELS} and /health",
        )

    def _no_such_model(self, model: Any) -> RequestRefused:
        return RequestRefused(
            HTTPStatus.NOT_FOUND, f"`model`: {str(model)[:200]!r} is not here; there is {self._config.name!r}"
        )


class _ForOneClient:
    """The engine, for one client: an answer ends when the client ``is_gone``, and what fails is ``RequestRefused``."""

    def __init__(self, engine: Engine, is_gone: Callable[[], bool]):
        self._engine, self._is_gone = engine, is_gone

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(self, request: Any, arguments: Any, progress_callback: Any = None) -> tuple[Any, Iterator[Any]]:
        try:
            context, responses = self._engine.generate(request, arguments, progress_callback)
        except Exception as error:
            raise RequestRefused(status_of(error), " ".join(str(error).split()) or type(error).__name__) from error

        def followed() -> Iterator[Any]:
            for response in responses:
                if self._is_gone():
                    raise ConnectionResetError("the client went away")
                yield response

        return context, followed()


def _check_rest(body: dict[str, Any]) -> None:
    """Refuses what mlx-lm would ignore, or stumble over after it has begun to answer."""
    problem = ""
    stop = body.get("stop", [])
    if not (isinstance(stop, str) or (isinstance(stop, list) and all(isinstance(word, str) and word for word in stop))):
        problem = "`stop` must be a text or a list of texts"
    options = body.get("stream_options", {})
    if not isinstance(options, dict):
        problem = "`stream_options` must be an object"
    elif options:
        body["stream_options"] = {"include_usage": bool(options.get("include_usage", False))}
    if not isinstance(body.get("chat_template_kwargs", {}), dict):
        problem = "`chat_template_kwargs` must be an object"
    if body.get("n", 1) != 1:
        problem = "`n` must be 1: one answer for a request"
    form = body.get("response_format", {"type": "text"})
    if not isinstance(form, dict) or form.get("type") != "text":
        problem = "`response_format`: only text is offered"
    if problem:
        raise RequestRefused(HTTPStatus.BAD_REQUEST, problem)
