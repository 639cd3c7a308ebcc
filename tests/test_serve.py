"""``macft serve``: real HTTP requests to a server process; answers equal those of ``macft generate``."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

import macft.serve
from harness.runs import environment
from helpers.models import random_adapter
from helpers.names import NASTY
from helpers.serving import CHAT, JSON, Served, answers_of_one_process, events, served
from macft.errors import ConfigError, LaunchError, MacftError
from macft.evaluation.chat import Sampling
from macft.model.adapters.settings import AdapterConfig

pytestmark = pytest.mark.slow

QUESTIONS = ("Repeat: red", "seven lamps", "what is north? " * 9, "quiet", "river stone paper")


@pytest.fixture(scope="module")
def adapter_folder(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / NASTY
    random_adapter(folder, tiny_model_folder, AdapterConfig(rank=4, scale=4.0))
    return folder


@pytest.fixture(scope="module")
def server(adapter_folder: Path) -> Iterator[Served]:
    with served("--adapter-path", adapter_folder, "--name", "tuned") as running:
        yield running


@pytest.fixture(scope="module")
def expected(adapter_folder: Path, tiny_model_folder: Path) -> Any:
    """``(question, sampling, seed) -> the answer of one process``."""
    return answers_of_one_process(tiny_model_folder, adapter_folder)


def test_greedy_answers_are_those_of_generate(server: Served, expected: Any) -> None:
    answers = [expected(question, Sampling(max_tokens=12)) for question in QUESTIONS]
    assert len(set(answers)) > 1
    assert [server.text(question, max_tokens=12) for question in QUESTIONS] == answers
    with ThreadPoolExecutor(len(QUESTIONS)) as pool:  # generated in batches
        assert list(pool.map(lambda question: server.text(question, max_tokens=12), QUESTIONS)) == answers
    answer = server.chat(QUESTIONS[1], max_tokens=12)
    assert (answer["object"], answer["model"], answer["choices"][0]["finish_reason"]) == (
        "chat.completion",
        "tuned",
        "length",
    )
    assert answer["usage"]["completion_tokens"] == 12


def test_a_stream_has_the_same_answer_in_pieces(server: Served, expected: Any) -> None:
    body = {
        "messages": [{"role": "user", "content": [{"type": "text", "text": QUESTIONS[0]}]}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 9,
        "stop": None,  # as clients write what they don't set
    }
    *pieces, usage = events(server.post("/v1/chat/completions", body))
    texts = [piece["choices"][0]["delta"].get("content", "") for piece in pieces]
    assert len([text for text in texts if text]) > 1
    assert "".join(texts) == expected(QUESTIONS[0], Sampling(max_tokens=9))
    assert {piece["object"] for piece in [*pieces, usage]} == {"chat.completion.chunk"}
    assert usage["usage"]["completion_tokens"] == 9


def test_a_seed_gives_the_sample_of_generate(server: Served, expected: Any) -> None:
    sampling = Sampling(max_tokens=12, temp=1.5, top_k=50)
    answers = [server.text("Repeat: red", max_tokens=12, temperature=1.5, top_k=50, seed=seed) for seed in (3, 4)]
    assert answers == [expected("Repeat: red", sampling, seed) for seed in (3, 4)]
    assert answers[0] != answers[1]
    # As OpenAI's, a seed may be negative; and more tokens than there are is no limit.
    unlimited = server.text("Repeat: red", max_tokens=12, temperature=1.5, top_k=10**6, seed=3 - 2**64)
    assert unlimited == expected("Repeat: red", Sampling(max_tokens=12, temp=1.5), 3)
    assert server.text("Repeat: red", max_tokens=2, temperature=1.5, top_k=10**6)  # in a batch


def test_a_text_is_completed_without_a_chat_template(server: Served) -> None:
    answer = json.loads(server.post("/v1/completions", {"prompt": "Repeat: red", "max_tokens": 4}))
    assert (answer["object"], answer["usage"]["completion_tokens"]) == ("text_completion", 4)
    assert answer["choices"][0]["text"]


def test_models_and_health(server: Served) -> None:
    assert [model["id"] for model in server.get("/v1/models")["data"]] == ["tuned"]
    assert server.get("/v1/models/tuned")["id"] == "tuned"
    assert server.get("/health") == {"status": "ok"}


TEXT = "/v1/completions"
SAID: dict[str, Any] = {"messages": [{"role": "user", "content": "red"}]}


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        (CHAT, b"{", 400, "the request is not JSON"),
        (CHAT, b"[1]", 400, "must be a JSON object"),
        (CHAT, {}, 400, "`messages` must be a list of objects"),
        (CHAT, {"messages": [{"role": "user", "content": 7}]}, 400, "`messages`, message 1: `content` must be"),
        (CHAT, SAID | {"max_tokens": 0}, 400, "max_tokens must be at least 1"),
        (CHAT, SAID | {"temperature": "hot"}, 400, "temperature must be of type"),
        (CHAT, SAID | {"n": 2}, 400, "`n` must be 1"),
        (CHAT, SAID | {"stop": [3]}, 400, "`stop` must be a text or a list of texts"),
        (CHAT, SAID | {"response_format": {"type": "json_object"}}, 400, "only text is offered"),
        (CHAT, SAID | {"adapters": "/etc"}, 400, "this server has one model"),
        (CHAT, SAID | {"xtc_threshold": 0.7}, 400, "xtc_threshold must be at most 0.5"),
        (CHAT, SAID | {"logit_bias": {"99999": 1}}, 400, "there is no token 99999; they are numbered from 0 to 4095"),
        (CHAT, SAID | {"logit_bias": {"7": []}}, 400, "float() argument must be"),
        (CHAT, b'{"messages": [], "temperature": 1e999}', 400, "`messages`"),
        (CHAT, SAID | {"temperature": float("inf")}, 400, "temperature must be a finite number"),
        (CHAT, SAID | {"presence_penalty": 10**400}, 400, "presence_penalty must be a finite number"),
        (CHAT, SAID | {"stop": ["\ud800"]}, 400, "text that is not Unicode"),
        (CHAT, SAID | {"model": "gpt-4o"}, 404, "'gpt-4o' is not here; there is 'tuned'"),
        (CHAT, {"messages": [{"role": "user", "content": "red " * 2000}]}, 400, "and the model takes 512"),
        (TEXT, {"prompt": ["a"]}, 400, "`prompt` must be a text"),
        ("/v1/embeddings", {}, 404, "there is no /v1/embeddings; there are /v1/chat/completions"),
        ("/v1/models/other", None, 404, "'other' is not here"),
        ("/admin", None, 404, "there is no /admin"),
    ],
)
def test_a_mistake_in_a_request_is_one_line(server: Served, path: str, body: Any, status: int, message: str) -> None:
    code, said = server.refusal(path, body)
    assert code == status
    assert message in said
    assert "\n" not in said


def test_an_image_is_refused_before_anything_is_fetched(server: Served) -> None:
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.settimeout(0)
        url = f"http://127.0.0.1:{trap.getsockname()[1]}/secret"
        part = {"type": "image_url", "image_url": {"url": url}}
        code, said = server.refusal(CHAT, {"messages": [{"role": "user", "content": [part]}]})
        assert (code, "the type image_url" in said) == (400, True)
        with pytest.raises(BlockingIOError):
            trap.accept()


def test_limits_hold_before_a_body_is_read(server: Served) -> None:
    for length, status in (("99999999999999999999", 413), (str(2**30), 413), ("-1", 411), ("x", 411)):
        connection = HTTPConnection(*server.address, timeout=60)
        connection.putrequest("POST", CHAT)
        connection.putheader("Content-Length", length)
        connection.endheaders()
        assert connection.getresponse().status == status
        connection.close()


def test_a_web_page_may_not_use_it(server: Served) -> None:
    assert server.refusal(CHAT, SAID, {"Origin": "https://evil.example"})[0] == 403
    assert server.refusal("/v1/models", None, {"Host": "evil.example"})[0] == 403
    assert server.refusal(CHAT, SAID, {"Content-Type": "text/plain"})[0] == 415


def test_an_answer_ends_when_its_client_goes_away(adapter_folder: Path) -> None:
    endless = {"messages": SAID["messages"], "max_tokens": 10**9}
    with served("--adapter-path", adapter_folder, "--together", 1) as running:
        for body in (endless, endless | {"stream": True}, endless | {"seed": 1, "temperature": 1.0}):
            connection = HTTPConnection(*running.address, timeout=60)
            connection.request("POST", CHAT, json.dumps(body), JSON)
            if body.get("stream"):
                assert connection.getresponse().read(10)
            connection.close()
            assert running.text("red", max_tokens=2)  # there is room for one at a time
        connection = HTTPConnection(*running.address, timeout=60)
        connection.request("POST", CHAT, json.dumps(endless | {"stream": True}), JSON)
        assert connection.getresponse().read(10)
    connection.close()


def test_other_machines_need_the_key(adapter_folder: Path) -> None:
    words = ("--adapter-path", adapter_folder, "--host", "0.0.0.0")
    with served(*words) as running:
        key = running.lines[0].split()[-1]
        assert "clients need this key" in running.lines[0]
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer kéy"}):
            code, said = running.refusal(CHAT, SAID, headers)
            assert (code, "the key is missing or wrong" in said) == (401, True)
        assert running.refusal("/v1/models", None)[0] == 401
        assert running.get("/health") == {"status": "ok"}
        assert running.get("/v1/models", {"Authorization": f"Bearer {key}"})["data"]
    with served(*words, variables={"MACFT_API_KEY": "from-the-environment"}) as running:
        assert "from-the-environment" not in "".join(running.lines)
        assert running.get("/v1/models", {"Authorization": "Bearer from-the-environment"})["data"]


def test_a_streamed_model_gives_the_same_answers(adapter_folder: Path, expected: Any) -> None:
    with served("--adapter-path", adapter_folder, "--placement", "stream") as running, ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda question: running.text(question, max_tokens=5), QUESTIONS[:2]))
    assert answers == [expected(question, Sampling(max_tokens=5)) for question in QUESTIONS[:2]]


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ([], ConfigError, "RUN_FOLDER: name a run's folder"),
        (["--port", "99999"], ConfigError, "--port: 99999 is not from 0 to 65535"),
        (["--api-key", ""], ConfigError, "--api-key: is empty"),
        (["--api-key", "a b"], ConfigError, "--api-key: must be printable ASCII"),
        (["--together", "0"], ConfigError, "--together: 0 must be 1 or more"),
        (["--max-tokens", "-1"], ConfigError, "--max-tokens: -1 must be 1 or more; a server's answers have a limit"),
        (["--temp", "-1"], ConfigError, "--temp: -1.0 must be 0"),
        (["--host", "no-such-host.invalid"], LaunchError, "--host: can't listen at no-such-host.invalid"),
    ],
)
def test_a_mistake_is_one_line_before_a_model_loads(
    words: Sequence[str], error: type[MacftError], message: str, adapter_folder: Path
) -> None:
    with pytest.raises(error) as raised:
        macft.serve.main([*(["--adapter-path", str(adapter_folder)] if words else []), *words])
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_model_that_cannot_be_read_ends_the_command(tmp_path: Path, tiny_model_folder: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_model_folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes()[: 5000 if file.suffix == ".safetensors" else None])
    done = subprocess.run(
        [sys.executable, "-m", "macft.serve", "--port", "0", "--model", str(broken)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {broken} can't be read")
    assert done.stderr.count("\n") == 1
