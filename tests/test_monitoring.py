"""``macft monitor``: the facts of a run, at a terminal of any width and on a page, served with real HTTP."""

from __future__ import annotations

import io
import json
import os
import random
import re
import socket
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from hashlib import sha256
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from helpers.browser import CHROMIUM, browser
from helpers.report_events import SAMPLE, started, step
from macft import monitor
from macft.errors import ConfigError, LaunchError, MacftError
from macft.monitoring.curve import Curve
from macft.monitoring.facts import RunFacts
from macft.monitoring.feed import Feed
from macft.monitoring.run_watch import RunWatch
from macft.monitoring.runs import newest_run, roots_of, runs_below
from macft.monitoring.terminal import TerminalView
from macft.monitoring.web import MonitorServer
from macft.parallel.node_status import NodeStatus
from macft.report.events import (
    Evaluated,
    Event,
    MetricScored,
    NodeDescription,
    NodesChanged,
    Noted,
    RingFormed,
    RunEnded,
    SamplesShown,
)
from macft.report.growing_file import GrowingFile
from macft.report.sinks.metrics_file import MetricsFile

NODES = [
    NodeDescription("studio", "Apple M2 Max, Metal, 32 GiB", 25e9, [0, 11], 2.5e9),
    NodeDescription("<b>air</b>", "Apple M1, Metal, 8 GiB", 5.6e9, [12, 23], 117e6),
]
STATUSES = [
    NodeStatus(
        tokens=300, busy_seconds=0.5, temperature=61.25, state=0, watts=38.0, joules=900.0, peak_memory=8_300_000_000,
        wait_seconds=0.1, wire_seconds=0.02, disk_seconds=0.05,
    ),
    NodeStatus(
        tokens=100, busy_seconds=0.4, duty=0.7, reason="temperature", temperature=97.5, state=1, watts=12.5,
        estimated=True, joules=300.0, peak_memory=4_900_000_000, wait_seconds=0.0, wire_seconds=0.03, disk_seconds=0.0,
    ),
]  # fmt: skip


def write(folder: Path, *told: Event) -> Path:
    """A run's folder with these events in its metrics file, after those that are there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").touch()
    file = MetricsFile(folder / "metrics.jsonl", first_step=1 << 40)
    for event in told:
        file.handle(event)
    file.close()
    return folder


def ring_of_two(folder: Path) -> list[Event]:
    steps = [replace(step(n), nodes=STATUSES, shares=[0.75, 0.25]) for n in range(1, 13)]
    return [
        started(folder),
        RingFormed(0, NODES, 2.5e-4),
        MetricScored(0, "sql_execution", "test", "before", 0.125, 64, 2.0),
        Evaluated(0, 3.5, 900, 1.0, True),
        *steps,
        Evaluated(12, 2.25, 900, 1.0, True),
        Noted("thermal: node 1 <script>alert(1)</script>", "warning"),
        SamplesShown(12, [SAMPLE]),
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs: one of two nodes that goes on, an older one that has ended."""
    place = tmp_path_factory.mktemp("place")
    older = place / "runs" / "sql" / "2026-01-01_00-00-00"
    write(older, started(older), step(1), RunEnded("finished", 1, 3.0, {"valid_loss": 1.0}))
    os.utime(older / "config.yaml", (1, 1))
    newer = place / "runs" / "sql" / "2026-02-01_00-00-00"
    write(newer, *ring_of_two(newer))
    return place


@pytest.fixture(scope="module")
def newest(place: Path) -> Path:
    return place / "runs" / "sql" / "2026-02-01_00-00-00"


# Facts


def test_the_facts_are_those_of_the_events(newest: Path, tmp_path: Path) -> None:
    watch = RunWatch(newest)
    assert watch.update()
    assert not watch.update()
    facts = watch.facts(time.time())
    assert (facts.status, facts.step, facts.total_steps, facts.has_ended) == ("training", 12, 20, False)
    assert (facts.loss, facts.valid_loss, facts.best_valid_loss) == (pytest.approx(2.8), 2.25, 2.25)
    assert facts.tokens_per_second == pytest.approx(800)
    assert facts.seconds_left == pytest.approx(4)
    assert facts.watts == 50.5
    assert [(score.name, score.before, score.after) for score in facts.scores] == [("sql execution", "12.5%", "")]
    write(tmp_path, MetricScored(0, "perplexity", "test", "after", 3.25, 64, 2.0))
    scored = RunWatch(tmp_path)
    scored.update()
    (score,) = scored.facts().scores
    assert (score.name, score.after, scored.facts().events[0].text[:15]) == ("perplexity", "3.25", "perplexity 3.25")
    assert [point.step for point in facts.train_curve] == list(range(1, 13))
    assert [tuple(point) for point in facts.valid_curve] == [(0, 3.5), (12, 2.25)]
    first, second = facts.nodes
    assert (first.name, first.blocks, first.memory, first.to_next) == ("studio", "0-11", 25e9, 2.5e9)
    assert (first.share, first.tokens_per_second, first.state) == (0.75, pytest.approx(600), "nominal")
    assert (first.compute_seconds, first.wait_seconds, first.disk_seconds) == (pytest.approx(0.35), 0.1, 0.05)
    assert (second.duty, second.reason, second.is_estimated) == (0.7, "temperature", True)
    assert second.peak_memory == 4.9e9
    assert [event.level for event in facts.events] == ["info", "good", "info", "info", "warning"]


def test_a_run_that_says_nothing_is_told_and_an_end_ends_it(tmp_path: Path) -> None:
    write(tmp_path, started(tmp_path), step(1))
    watch = RunWatch(tmp_path)
    watch.update()
    now = time.time()
    assert watch.facts(now + 2).silent_seconds is None
    assert watch.facts(now + 60).silent_seconds == pytest.approx(60, abs=2)
    write(tmp_path, RunEnded("failed", 1, 3.0, detail="the loss became NaN"))
    watch.update()
    facts = watch.facts(now + 60)
    assert (facts.status, facts.detail, facts.has_ended) == ("failed", "the loss became NaN", True)
    assert facts.silent_seconds is facts.seconds_left is None


def test_nodes_that_change_are_those_of_the_new_ring(tmp_path: Path) -> None:
    change = NodesChanged(12, 1, ["studio"], {"<b>air</b>": "it was lost"}, [], [1.0], True, 2.0)
    write(tmp_path, *ring_of_two(tmp_path), change)
    watch = RunWatch(tmp_path)
    watch.update()
    assert [(node.name, node.to_next) for node in watch.facts().nodes] == [("studio", None)]
    write(tmp_path, RingFormed(1, [NodeDescription("studio", "M2", 25e9)]), replace(step(13), nodes=STATUSES[:1]))
    watch.update()
    (node,) = watch.facts().nodes
    assert "all_reduce" not in watch.facts().parts
    assert (node.device, node.blocks, node.tokens_per_second) == ("M2", "", pytest.approx(600))
    assert watch.facts().events[-1].text == "step 12: <b>air</b> is lost (it was lost); 1 node now"


def test_a_resumed_run_is_read_from_its_beginning(tmp_path: Path) -> None:
    write(tmp_path, started(tmp_path), *map(step, range(1, 9)))
    watch = RunWatch(tmp_path)
    watch.update()
    MetricsFile(tmp_path / "metrics.jsonl", first_step=4).close()
    write(tmp_path, started(tmp_path, 4), step(5, 0.5))
    assert watch.update()
    assert [point.step for point in watch.facts().train_curve] == [1, 2, 3, 4, 5]
    assert watch.facts().loss == 0.5


def test_a_line_counts_once_its_end_is_there(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    file = GrowingFile(path)
    assert file.read() == []
    with path.open("wb", buffering=0) as writer:
        writer.write(b"one\ntw")
        assert file.read() == [b"one"]
        writer.write(b"o\n\nthree")
        assert file.read() == [b"two", b""]
    assert (file.read(), file.incarnation) == ([], 1)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-100, 100), max_size=200), st.sampled_from([2, 8, 16]))
def test_a_curve_of_any_length_keeps_its_mean(values: list[float], most: int) -> None:
    curve = Curve(most)
    for number, value in enumerate(values):
        curve.add(number, value)
    points = curve.points
    assert len(points) <= most
    assert [point.step for point in points] == sorted({point.step for point in points})
    if len(values) <= most:
        assert [point.value for point in points] == values
    elif len(values) in [most << doublings for doublings in range(8)]:  # each point has as many values
        assert sum(p.value for p in points) / len(points) == pytest.approx(sum(values) / len(values), abs=1e-6)


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers(-(10**400), 10**400) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
fields = (
    "step", "total_steps", "first_step", "world_size", "loss", "tokens", "seconds", "time", "parts", "nodes", "shares",
    "text", "reason", "name", "names", "left", "joined", "value", "when", "energy", "generation", "latency", "model",
)  # fmt: skip
kinds = ("run_started", "ring_formed", "step_done", "evaluated", "metric_scored", "nodes_changed", "noted", "run_ended")
node_values = st.dictionaries(
    st.sampled_from(["name", "blocks", "memory", "to_next", "tokens", "busy_seconds", "state", "watts", "duty"]),
    json_values,
    max_size=4,
)
odd_events = st.fixed_dictionaries(
    {"type": st.sampled_from([*kinds, "checkpoint_saved", "?"])},
    optional={**dict.fromkeys(fields, json_values), "nodes": json_values | st.lists(node_values, max_size=3)},
)


@settings(max_examples=60, deadline=None)
@given(lines=st.lists(odd_events.map(lambda event: json.dumps(event).encode()) | st.binary(max_size=20), max_size=6))
def test_any_file_is_shown(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]) -> None:
    folder = tmp_path_factory.mktemp("odd")
    (folder / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    watch = RunWatch(folder)
    watch.update()
    shown(watch.facts(), 60)
    state = json.loads(Feed([folder]).moment().data, parse_constant=pytest.fail)
    assert state["run"] == folder.name


# The terminal


def shown(facts: RunFacts, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(TerminalView(facts))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 110, 140, 150, 160, 170, 200])
def test_the_terminal_shows_the_same_facts_at_any_width(newest: Path, width: int) -> None:
    watch = RunWatch(newest)
    watch.update()
    text = shown(watch.facts((newest / "metrics.jsonl").stat().st_mtime), width)
    assert max(map(len, text.splitlines())) <= width
    together = " ".join(text.split())
    for fact in (
        "bundled-name", "lora rank 8", "2,400 rows to train", "12/20 60%", "training, 0:04 left", "loss 2.800",
        "validation 2.250", "sql execution 12.5%", "800 tokens/s", "lr 1.00e-04", "50.5 W~", "1,200 J", "compute 60%",
        "studio", "<b>air</b>", "Apple M2 Max", "0-11", "12-23", "75%", "25%", "600", "250", "61.2 C", "97.5 C",
        "nominal", "moderate", "38.0 W", "12.5 W~", "70% temperature", "900 J", "8.30 of 25 GB", "4.90 of 5.60 GB",
        "0.35 s", "0.10 s", "0.02 s", "0.05 s", "20.0 Gbit/s", "936 Mbit/s", "ring: 250 us from node to node",
        "validation loss 2.250, the best so far", "thermal: node 1 <script>alert(1)</script>", "▁", "█",
    ):  # fmt: skip
        assert fact in together, fact


def test_without_a_folder_the_run_that_began_last_is_shown(
    place: Path, newest: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(place)
    assert newest_run(Path()) == newest.relative_to(place)
    monitor.main(["--once"])
    assert "12/20" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="no run is below runs/ or multirun/ in this folder"):
        monitor.main([])


def test_runs_are_found_beside_a_run_or_alone(place: Path, newest: Path, tmp_path: Path) -> None:
    names = ["sql/2026-02-01_00-00-00", "sql/2026-01-01_00-00-00"]
    assert [run.name for run in runs_below(roots_of(None, place))] == names
    assert [run.name for run in runs_below(roots_of(newest, tmp_path))] == names
    alone = write(tmp_path / "mine", step(1))
    assert [(run.name, run.folder) for run in runs_below(roots_of(alone, place))] == [("mine", alone)]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "elsewhere").symlink_to(alone)
    assert runs_below(roots_of(None, tmp_path)) == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nowhere"], "nowhere/metrics.jsonl does not exist"),
        (["--port", "8000"], "--port: is for --web"),
        (["--port", "0"], "--port: is for --web"),
        (["--web", "--once"], "--once: can't be used with --web"),
        (["--web", "--port", "70000"], "--port: 70000 is not from 0 to 65535"),
        (["--web", "--port", "x"], "argument --port: invalid int value: 'x'"),
        (["--web", "--host", "no-such-host.invalid"], "--host: can't listen at no-such-host.invalid"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], told: str) -> None:
    with pytest.raises(MacftError, match=re.escape(told)):
        monitor.main(words)


def test_a_port_in_use_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(LaunchError, match=f"can't listen at 127.0.0.1 port {port} .*give another --port"):
            monitor.main(["--web", "--port", str(port)])


# The page


@contextmanager
def serving(place: Path, token: str = "", host: str = "127.0.0.1") -> Iterator[tuple[str, int]]:
    """A running server of the runs in ``place``: its address."""
    with MonitorServer(Feed(roots_of(None, place)), host, 0, token) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield "127.0.0.1", server.server_port
        server.shutdown()
        thread.join(10)


@pytest.fixture(scope="module")
def address(place: Path) -> Iterator[tuple[str, int]]:
    with serving(place) as address:
        yield address


def asked(address: tuple[str, int], path: str, method: str = "GET", **headers: str) -> HTTPResponse:
    connection = HTTPConnection(*address, timeout=60)
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    return connection.getresponse()


def next_state(stream: HTTPResponse) -> Any:
    """The next event of a stream."""
    while not (line := stream.readline()).startswith(b"data: "):
        assert line, "the stream has ended"
    return json.loads(line.removeprefix(b"data: "))


def test_the_page_is_whole_and_fetches_nothing(address: tuple[str, int]) -> None:
    answer = asked(address, "/")
    page = answer.read().decode()
    assert (answer.status, answer.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert len(page) < 60_000
    assert not re.findall(r"""(?:src|href)=["'](?!data:)|@import|url\(http""", page)
    policy = answer.headers["Content-Security-Policy"]
    for tag in ("style", "script"):
        inner = page.split(f"<{tag}>")[1].split(f"</{tag}>")[0]
        assert f"{tag}-src 'sha256-{b64encode(sha256(inner.encode()).digest()).decode()}'" in policy
    assert "default-src 'none'" in policy
    assert "style=" not in page.split("<script>")[0]  # the policy forbids it


def test_the_stream_has_the_run_and_what_comes(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "now"
    with serving(tmp_path) as address:
        stream = asked(address, "/events")
        assert stream.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert next_state(stream) == {"runs": []}
        write(run, *ring_of_two(run))
        while (state := next_state(stream)).get("facts", {}).get("step") != 12:
            pass  # it was looked at while it was written
        assert (state["run"], state["runs"], state["facts"]["step"]) == ("now", ["now"], 12)
        assert state["facts"]["nodes"][1]["name"] == "<b>air</b>"
        write(run, RunEnded("finished", 12, 9.0, {"valid_loss": 2.0}))
        while (state := next_state(stream))["facts"]["status"] == "training":
            pass
        assert state["facts"]["status"] == "finished"
        stream.close()


def test_a_run_is_chosen_by_name_and_no_name_leads_out(address: tuple[str, int], place: Path) -> None:
    (place / "metrics.jsonl").write_text('{"type": "noted", "text": "secret"}\n')
    for wanted, found in (
        ("sql/2026-01-01_00-00-00", "sql/2026-01-01_00-00-00"),
        ("..", "sql/2026-02-01_00-00-00"),
        ("../..", "sql/2026-02-01_00-00-00"),
        ("/etc", "sql/2026-02-01_00-00-00"),
        ("%00", "sql/2026-02-01_00-00-00"),
    ):
        stream = asked(address, f"/events?run={wanted}")
        assert next_state(stream)["run"] == found
        stream.close()
    for path in ("/../../etc/passwd", "//etc/passwd", "/page.html", "/metrics.jsonl", "/events/.."):
        assert asked(address, path).status == 404


@pytest.mark.parametrize("path", ["/", "/events"])
def test_pages_of_others_are_refused(address: tuple[str, int], path: str) -> None:
    for headers in (
        {"Host": "evil.example"},  # DNS rebinding
        {"Host": "evil.example:80"},
        {"Host": ""},
        {"Host": "127.0.0.1.evil.example"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
    ):
        answer = asked(address, path, **headers)
        assert (answer.status, b"\n" in answer.read().rstrip()) == (403, False)
    port = address[1]
    for headers in ({"Host": f"localhost:{port}"}, {"Host": f"[::1]:{port}"}, {"Origin": f"http://127.0.0.1:{port}"}):
        assert asked(address, "/", **headers).status == 200


def test_from_elsewhere_a_token_is_needed(place: Path) -> None:
    token = "a-token_of-some-length"
    with serving(place, token, host="0.0.0.0") as address:
        for path in ("/", "/events", "/nothing"):
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer k\xe9y"}):
                assert asked(address, path, Host="studio.local:7080", **headers).status == 401
        assert asked(address, "/?token=wrong").status == 401
        assert asked(address, "/", Cookie="; =;\x01").status == 401
        answer = asked(address, f"/?token={token}&run=sql/2026-01-01_00-00-00%0d%0aX:y", Host="studio.local:7080")
        assert (answer.status, answer.headers["Location"]) == (303, "/?run=sql%2F2026-01-01_00-00-00%0D%0AX%3Ay")
        cookie = answer.headers["Set-Cookie"]
        assert {"HttpOnly", "SameSite=Lax"} <= {part.strip() for part in cookie.split(";")}
        assert asked(address, "/", Cookie=cookie.split(";")[0]).status == 200
        assert asked(address, "/", Authorization=f"Bearer {token}").status == 200
        stream = asked(address, f"/events?token={token}")
        assert next_state(stream)["run"] == "sql/2026-02-01_00-00-00"
        stream.close()


def test_loopback_needs_no_token_and_another_address_gets_one(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(MonitorServer, "serve_forever", lambda *_, **__: None)
    monitor.main(["--web", "--port", "0"])
    assert re.fullmatch(r"the page: http://127\.0\.0\.1:\d+/  \(Ctrl-C ends\)\n", capsys.readouterr().out)
    monitor.main(["runs/sql/2026-01-01_00-00-00", "--web", "--port", "0"])
    assert "/?run=sql%2F2026-01-01_00-00-00  (" in capsys.readouterr().out
    monitor.main(["--web", "--port", "0", "--host", "0.0.0.0"])
    said = capsys.readouterr().out
    tokens = set(re.findall(r"\?token=([\w-]+)", said))
    assert len(tokens) == 1
    assert len(tokens.pop()) >= 32
    assert "whoever has the token can see your runs" in said


def sent(address: tuple[str, int], data: bytes) -> bytes:
    """The beginning of the answer to ``data``, after which the client says nothing more."""
    with socket.create_connection(address, 60) as connection:
        with suppress(OSError):  # the server has closed it already
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        with suppress(ConnectionError):
            return connection.recv(64)
        return b""


MALFORMED = 200
"""10,000 of them were sent by hand."""


def test_requests_that_are_none_do_no_harm(address: tuple[str, int]) -> None:
    rng = random.Random(int(os.environ.get("MACFT_SEED", "7")))
    parts = [
        b"GET", b"POST", b"HEAD", b" ", b"/", b"/events?run=", b"%", b"HTTP/1.1", b"HTTP/9.9", b"\r\n", b"\r\n\r\n",
        b"\n", b"Host: 127.0.0.1", b"Host: [", b"Cookie: a=b", b"Content-Length: 99999999999", b":", b"\0", b"\xff\xfe",
        b"//[x",
    ]  # fmt: skip
    for _ in range(int(os.environ.get("MACFT_MALFORMED", MALFORMED))):
        data = b"".join(rng.choice(parts) for _ in range(rng.randrange(1, 30)))
        data += rng.randbytes(rng.randrange(20)) + rng.choice([b"\r\n\r\n", b""])
        assert b"Traceback" not in sent(address, data)
    assert asked(address, "/").status == 200


def test_a_request_has_a_size_and_a_method(address: tuple[str, int]) -> None:
    assert sent(address, b"GET /" + b"a" * 20_000).startswith(b"HTTP/1.0 431 ")
    assert sent(address, b"GET / HTTP/1.0\r\n" + b"X: y\r\n" * 4_000).startswith(b"HTTP/1.0 431 ")
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert asked(address, "/", method).status == 501


def test_many_connections_leave_room_for_later_ones(place: Path) -> None:
    with serving(place) as address:
        waiting = [socket.create_connection(address, 60) for _ in range(70)]
        waiting[-1].settimeout(60)
        with suppress(ConnectionError):
            assert waiting[-1].recv(1) == b""  # there are too many: it was closed at once
        for connection in waiting:
            connection.close()
        deadline = time.monotonic() + 60
        while True:
            with suppress(OSError):
                assert asked(address, "/").status == 200
                return
            assert time.monotonic() < deadline


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_shows_it(tmp_path: Path) -> None:
    run = write(tmp_path / "runs" / "now", *ring_of_two(tmp_path / "runs" / "now"))
    with serving(tmp_path) as address, browser(tmp_path / "profile") as page:
        for width, dark in ((1300, False), (390, True)):
            page.open(f"http://127.0.0.1:{address[1]}/", width=width, height=900, dark=dark)
            page.wait_for("document.querySelectorAll('.node-name').length === 2")
            text = page.value("document.body.innerText")
            for fact in (
                "bundled-name", "step 12 of 20, 60%", "2.800", "2.250", "12.5%", "800", "50.5 W", "studio",
                "<b>air</b>", "600 tokens/s", "75%", "8.30 of 25 GB", "61.3 °C", "nominal", "moderate", "70%",
                "temperature",
                "blocks 0–11", "compute 0.35 s", "disk 0.05 s", "<script>alert(1)</script>", "all reduce 0.15 s",
            ):  # fmt: skip
                assert fact in text, fact
            assert "20.0 Gbit/s" in page.value("document.getElementById('ring').textContent")
            assert "250 µs" in page.value("document.getElementById('ring').textContent")
            assert page.value("document.documentElement.scrollWidth") <= width
            page.value("document.getElementById('plot').dispatchEvent(new KeyboardEvent('keydown', {key: 'End'}))")
            label = page.value("document.querySelector('.hover').textContent")
            assert label == "step 12: 2.8000, validation 2.2500"
        write(run, RunEnded("finished", 12, 9.0))
        page.wait_for("document.getElementById('status').textContent === 'finished'")
        assert page.complaints == []
