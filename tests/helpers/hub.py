"""A stand-in of the Hugging Face Hub: as much of its HTTP interface as an upload uses."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any

from harness.loopback_http import serving


class Hub:
    """Repositories by name, each with its files; ``refuses`` is a status for every request that writes."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.tokens: set[str] = set()
        self.refuses: int | None = None
        self.objects: dict[str, bytes] = {}
        self.address = ""


@contextmanager
def local_hub() -> Iterator[Hub]:
    """A hub on loopback."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            """Prints nothing."""

        def do_POST(self) -> None:
            body = self._body()
            hub.tokens.add(self.headers.get("authorization", ""))
            if hub.refuses is not None:
                self._answer({"error": "no"}, hub.refuses)
            elif self.path == "/api/repos/create":
                asked = json.loads(body)
                name = "/".join(filter(None, [asked.get("organization"), asked["name"]]))
                hub.repositories.setdefault(name, {})
                hub.private[name] = bool(asked.get("private") or asked.get("visibility") == "private")
                self._answer({"url": f"{hub.address}/{name}", "id": name})
            elif self.path == "/api/validate-yaml":
                self._answer({"errors": [], "warnings": []})
            elif "/preupload/" in self.path:
                files = [
                    {"path": file["path"], "shouldIgnore": False, "uploadMode": self._mode(file["path"])}
                    for file in json.loads(body)["files"]
                ]
                self._answer({"files": files})
            elif self.path.endswith("/objects/batch"):
                objects = [
                    {**item, "actions": {"upload": {"href": f"{hub.address}/lfs/{item['oid']}", "header": {}}}}
                    for item in json.loads(body)["objects"]
                ]
                self._answer({"transfer": "basic", "objects": objects})
            elif "/commit/" in self.path:
                name = self.path.removeprefix("/api/models/").split("/commit/")[0]
                for line in body.splitlines():
                    entry = json.loads(line)
                    value = entry["value"]
                    if entry["key"] == "file":
                        hub.repositories[name][value["path"]] = base64.b64decode(value["content"])
                    elif entry["key"] == "lfsFile":
                        hub.repositories[name][value["path"]] = hub.objects[value["oid"]]
                self._answer({"commitUrl": f"{hub.address}/{name}/commit/0", "commitOid": "0" * 40})
            else:
                self._answer({"error": f"the stand-in has no {self.path}"}, 404)

        def do_PUT(self) -> None:
            data = self._body()
            assert self.path == f"/lfs/{hashlib.sha256(data).hexdigest()}"
            hub.objects[self.path.removeprefix("/lfs/")] = data
            self._answer({})

        def do_GET(self) -> None:
            self._answer({"error": f"the stand-in has no {self.path}"}, 404)

        def _mode(self, path: str) -> str:
            return "lfs" if path.endswith(".safetensors") else "regular"

        def _body(self) -> bytes:
            if self.headers.get("transfer-encoding") == "chunked":
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("content-length") or 0))

        def _answer(self, value: dict[str, Any], status: int = 200) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    with serving(Handler) as hub.address:
        yield hub
