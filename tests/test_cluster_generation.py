"""Answers of a model whose blocks are spread over ranks: equal to those of one process, token by token."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import stream_generate

import macft.evaluate
import macft.generate
import macft.serve
from harness.families import build
from harness.runs import environment, free_ports, uneven_dataset
from harness.tiny_model import TINY_CONFIG, make_tiny_model
from helpers.hosts import cluster
from helpers.models import random_adapter
from helpers.rings import local_listeners, run_ranks
from helpers.serving import CHAT, JSON, Served, answers_of_one_process, events, served
from macft.collective.ring.ring import Ring
from macft.collective.solo import Solo
from macft.config.execution import inference_execution
from macft.errors import ConfigError, MacftError, ModelError, ProtocolError
from macft.evaluation.batched import greedy_answers
from macft.evaluation.chat import Sampling
from macft.generation.layout import AnsweringNode, answering_layout
from macft.generation.pipeline import AnswerPipeline
from macft.generation.stage import AnsweringStage
from macft.generation.tasks import (
    Options,
    Outcome,
    Task,
    TaskKind,
    pack_outcome,
    pack_task,
    unpack_outcome,
    unpack_task,
)
from macft.model.adapters.settings import AdapterConfig
from macft.model.backends.choose import make_backend
from macft.model.load import LoadedModel, load
from macft.model.settings import ModelConfig
from macft.parallel.stage_layout import Stage, even_layout
from macft.parallel.stage_places import StagePlace, StagePlaces
from macft.run.generation.rank import DistributedModel, GenerationRank
from macft.run.stage_answers import StageAnswers

QUESTIONS = ("Repeat: red", "seven lamps", "what is north? " * 9, "quiet", "river stone paper")


# A model in parts, in this process.


def stage_of(folder: Path, blocks: range, stack: ExitStack) -> tuple[AnsweringStage, LoadedModel]:
    """The stage ``blocks`` of the model in ``folder``, and what it has loaded."""
    model = ModelConfig()
    loaded = load(model, folder, inference_execution(model, folder).streamed(tuple(blocks), reads_ends=True).padded())
    backend = make_backend(loaded.execution)
    stack.enter_context(backend.installed(loaded.model))
    return AnsweringStage(loaded, backend, blocks), loaded


def through(stages: list[AnsweringStage], task: Task) -> Outcome:
    """What all stages make of a task, which goes from one to the next as messages."""
    hidden = None
    for stage in stages:
        made = stage.compute(task, hidden)
        if isinstance(made, Outcome):
            return unpack_outcome(memoryview(pack_outcome(made)))
        task, hidden = unpack_task(pack_task(task, made))
    raise AssertionError("the last stage has no outcome")


# Windows and caches that forget, experts, state spaces, blocks of several kinds, learned positions, a wrapper.
SPREAD = ["llama", "gemma3_text", "gpt_oss", "qwen3_moe", "jamba", "qwen3_next", "lfm2", "gpt2", "mamba2", "gemma3"]


@pytest.mark.parametrize("family", SPREAD)
def test_stages_choose_the_tokens_of_the_whole_model(family: str, tmp_path: Path) -> None:
    folder = build(family, tmp_path / "model")
    execution = inference_execution(ModelConfig(), folder)
    whole = load(ModelConfig(), folder, execution)
    whole.model.eval()
    prompts = [list(range(5, 48)), [7, 9, 3, 11]]
    with make_backend(execution.padded()).installed(whole.model):
        expected = [
            [part.token for part in stream_generate(whole.model, whole.tokenizer, mx.array(prompt), max_tokens=24)]
            for prompt in prompts
        ]
    count = len(whole.model.layers)
    cut = max(1, count // 2)
    with ExitStack() as stack:
        stages = [stage_of(folder, blocks, stack)[0] for blocks in (range(cut), range(cut, count))]
        found: list[list[int]] = [[], []]
        for answer, prompt in enumerate(prompts):
            through(stages, Task(TaskKind.TOKENS, answer, tuple(prompt[:-1]), Options()))
        for place in range(24):  # by turns: the caches of answers don't meet
            for answer, tokens in enumerate(expected):
                if place < len(tokens):
                    last = found[answer][-1] if found[answer] else prompts[answer][-1]
                    outcome = through(stages, Task(TaskKind.TOKENS, answer, (last,), chooses=True))
                    assert outcome.token is not None
                    found[answer].append(outcome.token)
    assert found == expected


def test_a_model_whose_blocks_share_keys_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = build("gemma4_text", tmp_path / "model")
    with ExitStack() as stack, pytest.raises(ModelError, match="this model can't be spread over several nodes: ") as e:
        stage_of(folder, range(1, 2), stack)
    assert "\n" not in str(e.value)


def test_blocks_of_other_stages_are_never_read(five_blocks: Path) -> None:
    with ExitStack() as stack:
        stage, loaded = stage_of(five_blocks, range(2, 4), stack)
        assert loaded.streamed is not None
        hidden = mx.zeros((1, 3, TINY_CONFIG["hidden_size"]))
        for _ in range(2):
            stage.compute(Task(TaskKind.TOKENS, 0, (1, 2, 3), Options()), hidden)
        block = sum(value.nbytes for name, value in weights(five_blocks).items() if ".layers.2." in name)
        assert loaded.streamed.take_figures()[1] == 2 * block


def weights(folder: Path) -> dict[str, mx.array]:
    found = mx.load(str(folder / "model.safetensors"))
    assert isinstance(found, dict)
    return found


def test_a_stage_larger_than_its_memory_reads_its_blocks_again(five_blocks: Path) -> None:
    """Only block 1 stays in memory; the tokens are those of a stage that holds all."""
    model = ModelConfig()
    found = []
    for resident in ((0, 1, 2, 3, 4), (1,)):
        loaded = load(model, five_blocks, inference_execution(model, five_blocks).streamed(resident).padded())
        backend = make_backend(loaded.execution)
        with backend.installed(loaded.model), Solo() as alone:
            stage = AnsweringStage(loaded, backend, range(5))
            pipeline = AnswerPipeline(
                stage, StagePlace(0, (Stage(0, 0, 5),)), alone.open_channels([], "answers"), together=2
            )
            found.append(answers(pipeline, [[5, 6, 7], [9, 9, 4, 3]]))
    assert found[0] == found[1]


def answers(pipeline: AnswerPipeline, prompts: list[list[int]], options: Options | None = None) -> list[list[int]]:
    """The tokens of the answers, six of each."""
    begun = [pipeline.begin(each, options or Options(), most_tokens=6, stop_tokens=()) for each in prompts]
    found: dict[int, list[int]] = {number: [] for number in begun}
    while not pipeline.is_idle:
        for new in pipeline.advance():
            assert new.outcome.token is not None
            found[new.answer].append(new.outcome.token)
    return list(found.values())


@pytest.fixture
def pipeline(five_blocks: Path) -> Iterator[AnswerPipeline]:
    """One stage that has all blocks, which remembers two answers."""
    with ExitStack() as stack:
        stage, _ = stage_of(five_blocks, range(5), stack)
        channels = stack.enter_context(Solo()).open_channels([], "answers")
        yield AnswerPipeline(stage, StagePlace(0, (Stage(0, 0, 5),)), channels, together=2, remembered=2)


def test_more_answers_than_there_is_room_for_wait(pipeline: AnswerPipeline) -> None:
    prompts = [[5, 6, 7], [9, 9, 4, 3], [8], [5, 1], [2, 3, 4]]
    assert answers(pipeline, prompts) == [answers(pipeline, [prompt])[0] for prompt in prompts]


def test_a_prompt_goes_on_where_an_earlier_one_began_alike(pipeline: AnswerPipeline) -> None:
    prompt = list(range(20, 60))
    first = answers(pipeline, [prompt])[0]
    longer, other = [*prompt, *first, 7, 8], [*prompt[:30], 1, 2]
    expected = []
    for each in (longer, other):
        answers(pipeline, [[3], [4]])  # so that nothing is remembered
        expected.append(answers(pipeline, [each])[0])
    answers(pipeline, [prompt, [4]])
    number = pipeline.begin(longer, Options(), most_tokens=6, stop_tokens=())
    assert pipeline.reused(number) == len(prompt) + len(first) - 1  # the last token was never computed
    pipeline.end(number)
    answers(pipeline, [prompt, [4]])
    assert answers(pipeline, [longer])[0] == expected[0]
    assert answers(pipeline, [other])[0] == expected[1]


def test_an_answer_that_nobody_wants_any_more_leaves_no_trace(pipeline: AnswerPipeline) -> None:
    expected = answers(pipeline, [[5, 6, 7, 8]])[0]
    unwanted = pipeline.begin([5, 6, 7, 8], Options(), most_tokens=-1, stop_tokens=())
    for _ in range(3):
        pipeline.advance()
    pipeline.end(unwanted)
    assert answers(pipeline, [[5, 6, 7, 8]])[0] == expected


def test_penalties_and_biases_change_the_answer(pipeline: AnswerPipeline) -> None:
    plain = answers(pipeline, [[5, 6, 7]])[0]
    assert answers(pipeline, [[5, 6, 7]], Options(logit_bias=((77, 1e6),)))[0] == [77] * 6
    penalised = answers(pipeline, [[5, 6, 7]], Options(penalties={"repetition_penalty": 1e6}))[0]
    assert len(set(penalised)) == 6
    assert len(set(plain)) < 6  # a random model repeats itself


def fast(room: int = 99, head: float = 0.0) -> AnsweringNode:
    return AnsweringNode(room, 1.0, 20.0, head)


def slow(room: int = 99) -> AnsweringNode:
    return AnsweringNode(room, 4.0, 20.0)


@pytest.mark.parametrize(
    ("nodes", "blocks", "leader", "together", "expected"),
    [
        ([fast(), fast()], 6, 0, 1, "rank 0: blocks 0-2 > rank 1: blocks 3-5"),
        ([fast(), fast(), fast()], 7, 1, 4, "rank 1: blocks 0-2 > rank 2: blocks 3-4 > rank 0: blocks 5-6"),
        # One answer is fastest on the fast node, ten are where both compute.
        ([fast(), slow()], 10, 0, 1, "rank 0: blocks 0-8 > rank 1: blocks 9-9"),
        ([fast(), slow()], 10, 0, 10, "rank 0: blocks 0-7 > rank 1: blocks 8-9"),
        ([fast(6), slow()], 10, 0, 1, "rank 0: blocks 0-5 > rank 1: blocks 6-9"),
        # The last stage has the head besides.
        ([fast(head=3.0), fast(head=3.0)], 9, 0, 4, "rank 0: blocks 0-5 > rank 1: blocks 6-8"),
        ([fast(1), fast()], 6, 0, 1, "rank 0: blocks 0-0 > rank 1: blocks 1-5"),
        ([fast(1), fast(4), fast(2)], 6, 0, 1, "rank 0: blocks 0-0 > rank 1: blocks 1-3 > rank 2: blocks 4-5"),
        # Not all fit: two take turns on the ranks that read from disk.
        ([fast(2), fast(3)], 8, 0, 1, "rank 0: blocks 0-4 > rank 1: blocks 5-7"),
        ([fast(2), fast(3)], 8, 0, 8, "rank 0: blocks 0-3 > rank 1: blocks 4-7"),
        ([fast(0), fast()], 6, 0, 1, "None"),
        ([fast(1), fast(1)], 6, 0, 1, "None"),
    ],
)
def test_blocks_are_cut_by_memory_and_speed(
    nodes: list[AnsweringNode], blocks: int, leader: int, together: int, expected: str
) -> None:
    assert str(answering_layout(nodes, blocks, leader, together)) == expected


def test_a_model_of_many_blocks_is_cut_as_well_as_any_way_could() -> None:
    nodes = [AnsweringNode(30, 1.0, 5.0), AnsweringNode(9, 2.5, 4.0), AnsweringNode(12, 0.7, 9.0, 6.0)]
    for together in (1, 2, 5):
        layout = answering_layout(nodes, 24, 0, together)
        assert layout is not None

        def tokens(first: int, second: int, together: int = together) -> float:
            sizes = (first, second, 24 - first - second)
            times = [node.seconds(size, is_last=node.head > 0) for node, size in zip(nodes, sizes, strict=True)]
            return max(sum(times), together * max(times))

        found = tokens(*(len(stage.blocks) for stage in layout.pipelines[0][:2]))
        best = min(tokens(first, second) for first in range(1, 23) for second in range(1, 24 - first))
        assert found == pytest.approx(best, rel=2e-3)


def opened(model: Path, megabytes: list[float]) -> list[Any]:
    """By rank, the lines for the user when ranks with so much memory open the model's stages, or the error.

    What is around the blocks has 1.05 MB, and each block 0.15 MB.
    """
    wanted = DistributedModel.of(ModelConfig(path=str(model)), None, "1.0")

    def lines(ring: Ring) -> list[str]:
        rank = GenerationRank(ring, name=f"host-{ring.rank}", usable=1e6 * megabytes[ring.rank])
        try:
            with rank.open_stage(wanted, 0) as stage:
                return [str(stage.layout), *stage.from_disk]
        except ConfigError as error:
            return [str(error)]
        finally:
            ring.all_gather(b"")  # as a leader does that wants something else

    return run_ranks(local_listeners(len(megabytes)), lines)


def test_a_host_looks_where_the_run_has_found_its_model(
    five_blocks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(five_blocks.parent)  # as if it were topology.folder
    sent = DistributedModel.of(ModelConfig(path=str(tmp_path / "model")), None, "1.0", path_on_hosts=five_blocks.name)
    assert DistributedModel.unpack(sent.pack()).found_here().model.path == five_blocks.name
    (tmp_path / "model").symlink_to(five_blocks)
    assert DistributedModel.unpack(sent.pack()).found_here() == sent


def test_a_host_with_little_memory_gets_few_blocks(five_blocks: Path) -> None:
    assert opened(five_blocks, [1.6, 8.0]) == [["rank 0: blocks 0-0 > rank 1: blocks 1-4"]] * 2


def test_what_does_not_fit_is_one_line_before_anything_loads(five_blocks: Path) -> None:
    layout, note = opened(five_blocks, [1.76, 1.76])[0]
    assert layout.startswith("rank 0: blocks 0-")
    assert "reads " in note
    for (error,) in opened(five_blocks, [8.0, 0.8]):
        assert error == (
            "topology.memory_budget: host-1 has 0.0008 GB, and a part of this model takes 0.00154 GB, even with its "
            "other blocks read from disk; use a machine with more memory there, fewer nodes or fewer bits"
        )
    for (error,) in opened(five_blocks, [8.0] * 6):
        assert error == "--topology: 6 nodes are more than the 5 blocks of the model; use 5 or fewer"


@pytest.mark.parametrize(("ranks", "pipelines"), [(3, 1), (4, 2)])
def test_the_stages_of_a_run_answer_as_one_node(five_blocks: Path, ranks: int, pipelines: int) -> None:
    """Each question is asked by the first stage of a pipeline, and no stage reads blocks of another."""
    questions = [[5, 6, 7], [9, 9, 4, 3], list(range(20, 50)), [8, 8]]
    execution = inference_execution(ModelConfig(), five_blocks)
    whole = load(ModelConfig(), five_blocks, execution)
    expected = greedy_answers(whole.model, whole.tokenizer, questions, max_tokens=6, progress=lambda _: None)
    block = sum(value.nbytes for name, value in weights(five_blocks).items() if ".layers.2." in name)

    def answer(ring: Ring) -> dict[int, list[int]]:
        places = StagePlaces(ring, lambda count: even_layout(5, range(count), pipelines))
        own = places.layout.blocks_of(ring.rank)
        loaded = load(ModelConfig(), five_blocks, execution.streamed(tuple(own)).padded())
        backend = make_backend(loaded.execution)
        with backend.installed(loaded.model):
            stages = StageAnswers(loaded, backend, places, ring)
            mine = stages.questions(len(questions))
            prompts = [questions[number] for number in mine]
            found = stages(prompts, max_tokens=6, progress=lambda _: None, stopped=lambda: False)
        assert loaded.streamed is not None
        assert loaded.streamed.take_figures()[1] == len(own) * block
        return dict(zip(mine, found, strict=True))

    found = run_ranks(local_listeners(ranks), answer)
    assert [len(each) for each in found] == ([4, 0, 0] if pipelines == 1 else [2, 0, 2, 0])
    assert {number: tokens for each in found for number, tokens in each.items()} == dict(enumerate(expected))


def test_malformed_messages_between_stages_are_told() -> None:
    good = bytes(pack_task(Task(TaskKind.TOKENS, 1, (1, 2), Options()), mx.zeros((1, 2, 4))))
    task, hidden = unpack_task(memoryview(good))
    assert hidden is not None
    assert (task.tokens, hidden.shape) == ((1, 2), (1, 2, 4))
    for bad in (b"", good[:3], good[:-1], good + b"x", b"\xff\xff\xff\xff" + good[4:], good[:8] + b"\xc1" + good[9:]):
        with pytest.raises(ProtocolError):
            unpack_task(memoryview(bad))
    for bad in (b"", b"\x80", b"\xc1", pack_outcome(Outcome(3))[:-1]):
        with pytest.raises(ProtocolError):
            unpack_outcome(memoryview(bad))


# Whole commands, with processes of their own.


@pytest.fixture(scope="module")
def five_blocks(tmp_path_factory: pytest.TempPathFactory, bundled_model: Path) -> Path:
    """A random model of five blocks."""
    config = {**TINY_CONFIG, "num_hidden_layers": 5}
    return make_tiny_model(tmp_path_factory.mktemp("five-blocks"), bundled_model, config)


@pytest.fixture(scope="module")
def adapter_folder(tmp_path_factory: pytest.TempPathFactory, five_blocks: Path) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "ours"
    random_adapter(folder, five_blocks, AdapterConfig(rank=4, scale=4.0))
    return folder


@pytest.fixture(scope="module")
def expected(adapter_folder: Path, five_blocks: Path) -> Any:
    """``(question, sampling, seed) -> the answer of one process``."""
    return answers_of_one_process(five_blocks, adapter_folder)


@pytest.mark.slow
def test_generate_says_the_same_over_three_ranks(
    adapter_folder: Path, expected: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--adapter-path", str(adapter_folder), "-p", QUESTIONS[2], "-m", "12", "--topology", "local"]
    macft.generate.main([*words, "--nodes", "3"])
    said = capsys.readouterr()
    assert said.out == expected(QUESTIONS[2], Sampling(max_tokens=12)) + "\n"
    assert said.err.startswith("rank 0: blocks 0-1 > rank 1: blocks 2-3 > rank 2: blocks 4-4\n")


@pytest.mark.slow
def test_a_chat_with_a_seed_says_the_same_over_two_ranks(
    adapter_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--adapter-path", str(adapter_folder), "-m", "7", "--temp", "1.3", "--seed", "5", "--verbose", "False"]
    said = []
    for more in ([], ["--topology", "local"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("seven lamps\nand glass\nr\nquiet\nq\n"))
        macft.generate.main([*words, *more])
        said.append(capsys.readouterr())
    assert said[0].out == said[1].out
    assert said[1].err == ""


@pytest.mark.slow
def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(adapter_folder: Path, expected: Any) -> None:
    words = ["--adapter-path", adapter_folder, "-m", -1, "--verbose", "False", "--topology", "local"]
    chat = subprocess.Popen(
        [sys.executable, "-m", "macft.generate", *map(str, words)],
        env=environment() | {"PYTHONUNBUFFERED": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert chat.stdin is not None
    assert chat.stdout is not None
    for question in QUESTIONS[:3]:
        chat.stdin.write(f"r\n{question}\n".encode())
        chat.stdin.flush()
        beginning = expected(question, Sampling(max_tokens=30)).encode()[:60]
        assert chat.stdout.read(len(beginning)) == beginning
        chat.send_signal(signal.SIGINT)
        assert chat.stdout.readline().endswith(b" ... (stopped)\n")
    _, errors = chat.communicate(b"q\n", timeout=60)
    assert (chat.returncode, errors) == (0, b"")


@pytest.mark.slow
def test_evaluate_finds_the_same_over_two_ranks(adapter_folder: Path, tmp_path: Path) -> None:
    common = ["--adapter-path", str(adapter_folder), "--dataset", str(uneven_dataset(tmp_path / "data"))]
    reports = []
    for name, words in (("one", []), ("two", ["--topology", "local"])):
        file = tmp_path / f"{name}.json"
        macft.evaluate.main([*common, "--metric", "exact_match", "-m", "6", "--json", str(file), *words])
        reports.append(json.loads(file.read_text()))
    alone, together = reports
    for which in ("base", "tuned"):
        assert together[which]["loss"] == pytest.approx(alone[which]["loss"], rel=1e-6)
    assert together["answers"] == alone["answers"]
    assert together["target_tokens"] == alone["target_tokens"]


@pytest.fixture(scope="module")
def server(adapter_folder: Path) -> Iterator[Served]:
    with served("--adapter-path", adapter_folder, "--name", "tuned", "--topology", "local", "--nodes", 2) as running:
        yield running


@pytest.mark.slow
def test_a_served_cluster_gives_the_answers_of_one_process(server: Served, expected: Any) -> None:
    wanted = [expected(question, Sampling(max_tokens=12)) for question in QUESTIONS]
    assert [server.text(question, max_tokens=12) for question in QUESTIONS] == wanted
    with ThreadPoolExecutor(len(QUESTIONS)) as pool:
        assert list(pool.map(lambda question: server.text(question, max_tokens=12), QUESTIONS)) == wanted
    assert server.chat(QUESTIONS[2], max_tokens=3)["usage"]["prompt_tokens_details"]["cached_tokens"] > 40


@pytest.mark.slow
def test_a_served_cluster_streams_and_samples(server: Served, expected: Any) -> None:
    sampling = Sampling(max_tokens=9, temp=1.5, top_k=50)
    options = {"max_tokens": 9, "temperature": 1.5, "top_k": 50, "seed": 3}
    body = {"messages": [{"role": "user", "content": QUESTIONS[0]}], "stream": True, **options}
    pieces = [event["choices"][0]["delta"].get("content", "") for event in events(server.post(CHAT, body))]
    assert "".join(pieces) == expected(QUESTIONS[0], sampling, 3)
    assert len([piece for piece in pieces if piece]) > 1
    top = server.chat(QUESTIONS[0], max_tokens=2, logprobs=True, top_logprobs=3)["choices"][0]["logprobs"]["content"]
    assert [len(each["top_logprobs"]) for each in top] == [3, 3]
    first = server.text(QUESTIONS[0], max_tokens=12)
    word = first.split()[1]
    assert server.text(QUESTIONS[0], max_tokens=12, stop=f" {word}") == first.partition(f" {word}")[0]


@pytest.mark.slow
def test_mistakes_are_told_by_a_served_cluster_too(server: Served) -> None:
    code, said = server.refusal(CHAT, {"messages": [{"role": "user", "content": "red " * 2000}]})
    assert (code, "and the model takes 512" in said) == (400, True)
    odd = {"max_tokens": 2, "temperature": 1.0, "top_k": 10**6, "seed": -1}
    assert server.text("red", **odd) == server.text("red", **odd | {"top_k": 0, "seed": 2**64 - 1})
    code, said = server.refusal(CHAT, {"messages": [{"role": "user", "content": "red"}], "logit_bias": {"-1": 1}})
    assert (code, "there is no token -1" in said) == (400, True)
    assert server.get("/health") == {"status": "ok"}


@pytest.mark.slow
def test_answers_go_on_when_a_rank_is_killed(adapter_folder: Path, expected: Any) -> None:
    """The rank in the middle is killed while an answer is streamed, and the last one while nothing is asked for."""
    words = ("--adapter-path", adapter_folder, "--topology", "local", "--nodes", 3)
    long = expected(QUESTIONS[0], Sampling(max_tokens=200))
    with served(*words) as running:
        connection = HTTPConnection(*running.address, timeout=60)
        body = {"messages": [{"role": "user", "content": QUESTIONS[0]}], "stream": True, "max_tokens": 200}
        connection.request("POST", CHAT, json.dumps(body), JSON)
        stream = connection.getresponse()
        beginning = stream.read(4000)
        middle, last = running.workers()
        middle.kill()
        pieces = events(beginning + stream.read())
        assert "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces) == long
        last.kill()
        assert running.text(QUESTIONS[1], max_tokens=12) == expected(QUESTIONS[1], Sampling(max_tokens=12))
        assert running.workers() == []


@pytest.mark.slow
def test_a_broken_weights_file_names_rank_and_file(five_blocks: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in five_blocks.iterdir():
        (broken / file.name).write_bytes(file.read_bytes()[: -9 if file.suffix == ".safetensors" else None])
    with pytest.raises(ModelError) as raised:
        macft.generate.main(["--model", str(broken), "-p", "x", "--topology", "local"])
    for line, name in zip(str(raised.value).splitlines(), ("this machine", "local-1"), strict=True):
        assert line.startswith(f"{name}: model.path: {broken / 'model.safetensors'} has ")


@pytest.mark.parametrize("main", [macft.generate.main, macft.serve.main])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "2"], "--nodes: is for --topology local"),
        (["--topology", "local", "--nodes", "1"], "--nodes: 1 must be 2 or more"),
        (["--topology", "local", "--placement", "stream"], "--placement: stream is for one machine"),
        (
            ["--placement", "pipeline"],
            "--placement: pipeline spreads a model over machines; generate, evaluate and serve",
        ),
        (["--topology", "nowhere"], "topology: no cluster 'nowhere'"),
        (["--topology", "local", "--by-hand"], "--by-hand: is for the machines of a cluster"),
    ],
)
def test_a_mistake_is_one_line_before_anything_starts(
    main: Any, words: list[str], message: str, five_blocks: Path
) -> None:
    with pytest.raises(MacftError) as raised:
        main(["--model", str(five_blocks), *(["-p", "x"] if main is macft.generate.main else []), *words])
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_more_nodes_than_blocks_are_refused(tiny_model_folder: Path) -> None:
    with pytest.raises(ConfigError, match="--nodes: 3 nodes are more than the 2 blocks of the model; use 2 or fewer"):
        macft.generate.main(["--model", str(tiny_model_folder), "-p", "x", "--topology", "local", "--nodes", "3"])


@pytest.mark.slow
def test_machines_of_a_cluster_are_started_over_ssh(
    adapter_folder: Path, expected: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Two hosts, of which the machine at the terminal is none: it leads, and the connection is encrypted."""
    with cluster(tmp_path_factory.mktemp("hosts"), 2) as made:
        folder = made.home / "config/topology"
        folder.mkdir(parents=True)
        hosts = [host.address for host in made.hosts]
        (folder / "desk.yaml").write_text(json.dumps({"kind": "ssh", "hosts": hosts, "python": [sys.executable]}))
        words = ["--adapter-path", str(adapter_folder), "-p", QUESTIONS[0], "-m", "12", "--topology", "desk"]

        def call(*before: str) -> subprocess.CompletedProcess[str]:
            command = [*before, sys.executable, "-m", "macft.generate", *words]
            return subprocess.run(
                command, env=made.environment(), capture_output=True, text=True, timeout=120, check=False
            )

        done = call()
        assert done.returncode == 0, done.stderr
        assert done.stdout == expected(QUESTIONS[0], Sampling(max_tokens=12)) + "\n"
        assert done.stderr.startswith("rank 0: blocks 0-1 > rank 1: blocks 2-3 > rank 2: blocks 4-4\n")
        done = call(*made.inside(made.hosts[1]))  # now it is one of them
        assert done.returncode == 0, done.stderr
        assert done.stdout == expected(QUESTIONS[0], Sampling(max_tokens=12)) + "\n"
        assert done.stderr.startswith("rank 0: blocks 0-3 > rank 1: blocks 4-4\n")
        (folder / "desk.yaml").write_text(json.dumps({"kind": "ssh", "hosts": hosts, "python": ["/no/python"]}))
        done = call()
        assert done.returncode == 1
        assert f"{hosts[0]} ended: " in done.stderr
        assert "/no/python" in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_hosts_at_which_the_command_is_given_answer_together(
    adapter_folder: Path, expected: Any, tmp_path: Path
) -> None:
    """The second host has no adapter of that name: it needs none."""
    hosts = [f"127.0.0.1:{port}" for port in free_ports(2)]
    commands = []
    for rank, adapter in enumerate((adapter_folder, tmp_path / "elsewhere")):
        folder = tmp_path / f"host-{rank}"
        (folder / "topology").mkdir(parents=True)
        (folder / "topology/desk.yaml").write_text(json.dumps({"kind": "ssh", "hosts": hosts, "rank": rank}))
        words = ["--adapter-path", str(adapter), "-p", QUESTIONS[0], "-m", "12", "--topology", "desk", "--by-hand"]
        commands.append(
            subprocess.Popen(
                [sys.executable, "-m", "macft.generate", *words],
                env=environment() | {"MACFT_CONFIG": str(folder)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    (said, layout), (nothing, line) = [command.communicate(timeout=240) for command in commands]
    assert [command.returncode for command in commands] == [0, 0], layout + line
    assert said == expected(QUESTIONS[0], Sampling(max_tokens=12)) + "\n"
    assert "rank 0: blocks 0-3 > rank 1: blocks 4-4\n" in layout
    assert (nothing, line.splitlines()[0]) == ("", f"rank 1: the answers are on {hosts[0]}, which leads")
