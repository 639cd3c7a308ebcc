"""Nodes whose memory the model exceeds: what they train and answer, how much they take, how fast they are.

    python benchmarks/memory_limits.py [--model smollm2|1b] [--work train answer refuse peer]
        [--ways stream-1 pipeline-2] [--limit 480MB] [--link 1gbit] [--write]

Each node is a process with a core (nodes share cores where there are fewer) and a memory limit that the kernel keeps: a
control group's where one can be made (Linux, root), otherwise `ulimit -d`. Weights are dropped from the system's cache
before. Everything is compared with one node that has no limit and holds the whole model: losses must be within 1e-6 and
greedy tokens the same, or the script ends with status 1. `refuse` shows what becomes of topology.placement=replicate
under the limit: the plan refuses it in one line, and where it is told of more memory than there is, the kernel kills
it.
`peer` is mlx-lm's own pipeline with the same limit. With `--link` each node is in a network namespace behind a card of
that speed.

Efficiency is the speed divided by that of the node without limit times the cores; the formula is 1 for stream, whose
reading hides behind computing, and m / (m + p - 1) for m micro-batches in a pipeline of p stages. ``--write`` adds the
results to memory_limits.json, and the table of all results to big_models.md.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness.random_weights import save_random_model
from harness.runs import events
from limited_nodes import Ended, Limited, drop_from_cache
from macft.collective.ring.security import KeyPair
from macft.collective.settings import CollectiveConfig
from macft.config.yaml import package_versions
from macft.launch.generation.worker import WorkerRequest
from macft.model.fetch.bundled import ensure_bundled
from macft.topology.settings import parse_budget

HERE = Path(__file__).parent
RESULTS, PAGE, MARKS = HERE / "memory_limits.json", HERE / "big_models.md", "<!-- memory_limits.py -->"
CLOSE = 1e-6
PATIENCE = 280.0
PROMPT = list(range(100, 148))
# 1.0 B parameters of the shape of TinyLlama; a family that mlx-lm can split.
SHAPE_1B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "vocab_size": 32000,
    "eos_token_id": 2,
}

SHAPES = {
    "1b": SHAPE_1B,
    "small": {
        **SHAPE_1B,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 32,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 4096,
    },
}


@dataclass(frozen=True)
class Case:
    """A model and what is done with it; ``weights`` are bytes as they are in memory, in float32."""

    name: str
    weights: float
    limit: int
    rows: int
    row_words: int
    steps: int
    tokens: int


CASES = {
    "smollm2": Case("SmolLM2-135M", 0.538e9, 480_000_000, rows=8, row_words=24, steps=3, tokens=16),
    "small": Case("random, 0.13 B", 0.545e9, 400_000_000, rows=4, row_words=12, steps=2, tokens=8),
    "1b": Case("random, 1.0 B", 4.14e9, 3_300_000_000, rows=4, row_words=10, steps=2, tokens=6),
}


@dataclass(frozen=True)
class Result:
    """A row of the table; ``peak`` of the node that had most, bytes; ``value``: what is compared."""

    model: str
    work: str
    way: str
    limit: int | None
    link: str | None
    peak: int
    rate: float = 0.0
    efficiency: float | None = None
    formula: float | None = None
    difference: float | None = None
    note: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """Which row it is."""
        return self.model, self.work, self.way, str(self.limit), str(self.link)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CASES, default="smollm2")
    parser.add_argument("--work", nargs="+", default=["train", "answer", "refuse"])
    parser.add_argument("--ways", nargs="+", default=["stream-1", "stream-2", "stream-4", "pipeline-2", "pipeline-4"])
    parser.add_argument("--limit", help="of each node, such as 480MB")
    parser.add_argument("--link", help="speed of each node's network card, such as 1gbit; Linux, root")
    parser.add_argument("--folder", type=Path, help="where the random model stays, to use it again")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no node is left
    case = CASES[arguments.model]
    limit = case.limit if arguments.limit is None else int(parse_budget(arguments.limit, 1.0))
    with tempfile.TemporaryDirectory() as scratch:
        proof = Proof(case, arguments.model, Path(scratch), limit, arguments.link, arguments.folder)
        works = {"train": proof.train, "answer": proof.answer, "refuse": proof.refuse, "peer": proof.peer}
        try:
            for work in arguments.work:
                works[work](arguments.ways)
        finally:
            if arguments.write:
                write(proof.results)
    wrong = [result for result in proof.results if result.difference is not None and result.difference > CLOSE]
    for result in wrong:
        print(f"NOT EQUAL: {result}")
    sys.exit(1 if wrong or proof.failures else 0)


class Proof:
    """A case in a scratch folder."""

    def __init__(self, case: Case, name: str, folder: Path, limit: int, link: str | None, keep: Path | None):
        self.case, self.folder, self.limit, self.link = case, folder, limit, link
        bundled = ensure_bundled()
        self.model = bundled
        if name in SHAPES:
            self.model = (keep or folder) / name
            if not self.model.is_dir():
                save_random_model(self.model, SHAPES[name], bundled)
        self._make_rows()
        with Limited(1, None, None, folder) as place:
            ended = place.start(0, ["-m", "macft.keys", "make"]).ended(PATIENCE)
            assert ended.status == 0, ended.errors
        self.results: list[Result] = []
        self.failures = 0
        self._reference: tuple[list[float], float] | None = None
        self._greedy: tuple[list[int], float] | None = None

    def _make_rows(self) -> None:
        words = ["red", "seven", "river", "lamp", "north", "glass", "stone", "quiet", "paper", "cloud"]
        for split, count in (("train", self.case.rows * self.case.steps), ("valid", 2)):
            rows = [
                {"text": " ".join(words[(n * 7 + k * k) % 10] for k in range(self.case.row_words))}
                for n in range(count)
            ]
            path = self.folder / "rows" / f"{split}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    # Training.

    def train(self, ways: Sequence[str]) -> None:
        """Each way, after the reference."""
        expected, alone = self._trained_without_limit()
        for way in ways:
            placement, nodes = way.split("-")[0], int(way.split("-")[1])
            ended, losses, rate, cores, layout = self._run(placement, nodes, self.limit, self.link)
            if not losses:
                self._failed("train", way, ended)
                continue
            micro = self.case.rows
            self._found(
                "train",
                way,
                ended,
                rate=rate,
                efficiency=rate / (cores * alone),
                formula=micro / (micro + nodes - 1) if placement == "pipeline" else 1.0,
                difference=max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True)),
                note=layout,
            )

    def refuse(self, _ways: Sequence[str]) -> None:
        """The whole model on each node."""
        planned, *_ = self._run("replicate", 1, self.limit, None)
        assert planned[0].status == 2, planned
        line = next(line for line in planned[0].errors.splitlines() if line.startswith("error: "))
        self._found("train", "replicate-1", planned, link=None, note=f"refused: {line.removeprefix('error: ')}")
        forced, *_ = self._run("replicate", 1, self.limit, None, "topology.memory_budget=99GB")
        assert forced[0].status != 0, forced
        how = "killed by the kernel" if forced[0].kills else f"ended with status {forced[0].status}"
        self._found("train", "replicate-1, topology.memory_budget=99GB", forced, link=None, note=how)

    def _trained_without_limit(self) -> tuple[list[float], float]:
        if self._reference is None:
            ended, losses, rate, _, _ = self._run("replicate", 1, None, None)
            assert losses, ended[0].errors[-2000:]
            self._reference = losses, rate
            self._found("train", "replicate-1", ended, limit=None, link=None, rate=rate, efficiency=1.0, difference=0.0)
        return self._reference

    def _run(
        self, placement: str, nodes: int, limit: int | None, link: str | None, *more: str
    ) -> tuple[list[Ended], list[float], float, int, str]:
        """Of a training: how the nodes ended, the losses, tokens a second, the cores, the layout."""
        drop_from_cache(self.model)
        with tempfile.TemporaryDirectory(dir=self.folder) as root, Limited(nodes, limit, link, self.folder) as place:
            words = [
                f"model={self.model}",
                f"dataset={self.folder / 'rows'}",
                f"training.batch_size={self.case.rows}",
                f"training.steps={self.case.steps}",
                "training.micro_batch_size=1",
                "training.recompute=blocks",
                "training.eval_every=0",
                "training.save_every=0",
                "adapter.num_layers=-1",
                "optimizer.warmup_steps=0",
                "thermal=off",
                "report.tensorboard=false",
                "report.samples=0",
                f"topology.placement={placement}",
                *more,
            ]
            if nodes > 1:
                words += ["topology=hosts", f"topology.hosts=[{','.join(place.hosts())}]"]
            started = []
            for rank in range(nodes):
                own = [f"topology.rank={rank}"] if nodes > 1 else []
                arguments = ["-m", "macft.train", *words, *own, f"hydra.run.dir={root}/{rank}"]
                started.append(place.start(rank, arguments))
            ended = [each.ended(PATIENCE) for each in started]
            steps = events(Path(root) / "0", "step_done")
            begun = events(Path(root) / "0", "run_started")
            timed = steps[1:]
            rate = sum(step["tokens"] for step in timed) / sum(step["seconds"] for step in timed) if timed else 0.0
            complete = len(steps) == self.case.steps and all(each.status == 0 for each in ended)
            losses = [step["loss"] for step in steps] if complete else []
            return ended, losses, rate, place.cores, begun[0]["layout"] if begun else ""

    # Answers.

    def answer(self, ways: Sequence[str]) -> None:
        """Greedy tokens of a cluster, and of one node that reads blocks from disk."""
        expected, alone = self._answered_without_limit()
        for way in ways:
            placement, nodes = way.split("-")[0], int(way.split("-")[1])
            if placement == "stream" and nodes > 1:  # a cluster that answers is a pipeline
                continue
            ended, found, layout = self._answered(placement, nodes, self.limit, self.link)
            if found is None:
                self._failed("answer", way, ended)
                continue
            rate, difference = self._rate(found), 0.0 if found["tokens"] == expected else 1.0
            self._found("answer", way, ended, rate=rate, efficiency=rate / alone, difference=difference, note=layout)

    def peer(self, ways: Sequence[str]) -> None:
        """mlx-lm's pipeline."""
        expected, alone = self._answered_without_limit()
        for nodes in [int(way.split("-")[1]) for way in ways if way.startswith("pipeline")]:
            drop_from_cache(self.model)
            with Limited(nodes, self.limit, self.link, self.folder) as place:
                hosts = self.folder / "hosts.json"
                hosts.write_text(json.dumps([[address] for address in place.hosts()]))
                started = []
                for rank in range(nodes):
                    variables = {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)}
                    started.append(place.start(rank, [str(HERE / "limited_answers.py")], variables=variables))
                    started[rank].tell(json.dumps(self._task("mlx-lm")))
                ended = [each.ended(PATIENCE) for each in started]
            way = f"mlx-lm, pipeline-{nodes}"
            if any(each.status for each in ended):
                self._failed("answer", way, ended)
            else:
                found = json.loads(ended[0].output.splitlines()[-1])
                rate, note = self._rate(found), "same tokens" if found["tokens"] == expected else "other tokens"
                self._found("answer", way, ended, rate=rate, efficiency=rate / alone, note=note)

    def _answered_without_limit(self) -> tuple[list[int], float]:
        if self._greedy is None:
            ended, found, _ = self._answered("replicate", 1, None, None)
            assert found is not None, ended
            rate = self._rate(found)
            self._greedy = found["tokens"], rate
            self._found(
                "answer", "replicate-1", ended, limit=None, link=None, rate=rate, efficiency=1.0, difference=0.0
            )
        return self._greedy

    def _rate(self, found: dict[str, Any]) -> float:
        return (len(found["tokens"]) - 1) / float(found["seconds"])

    def _task(self, way: str, **more: Any) -> dict[str, Any]:
        prompt = {"model": str(self.model), "prompt": PROMPT, "tokens": self.case.tokens}
        return {"way": way, **prompt, **more}

    def _answered(
        self, placement: str, nodes: int, limit: int | None, link: str | None
    ) -> tuple[list[Ended], dict[str, Any] | None, str]:
        drop_from_cache(self.model)
        with Limited(nodes, limit, link, self.folder) as place:
            script = [str(HERE / "limited_answers.py")]
            if nodes == 1:
                started = [place.start(0, script)]
                started[0].tell(json.dumps(self._task("alone", placement=placement)))
            else:
                requests = _requests(place.hosts())
                started = [place.start(0, script)]
                task = self._task("lead", request=asdict(requests[0]), must_match=package_versions())
                started[0].tell(json.dumps(task))
                for rank in range(1, nodes):
                    started.append(place.start(rank, ["-m", "macft.launch.generation.worker"]))
                    started[rank].tell(json.dumps(asdict(requests[rank])))
            ended = [started[0].ended(PATIENCE), *(each.ended(10.0) for each in started[1:])]
            if ended[0].status != 0:
                return ended, None, ""
            found = json.loads(ended[0].output.splitlines()[-1])
            return ended, found, found.get("layout", placement)

    def _failed(self, work: str, way: str, ended: Sequence[Ended]) -> None:
        told = [f"{each.status}: {(each.errors.strip().splitlines() or [''])[-1]}" for each in ended]
        self._found(work, way, ended, note=f"{sum(each.kills for each in ended)} kills, status {', '.join(told)}")
        self.failures += 1

    def _found(self, work: str, way: str, ended: Sequence[Ended], **more: Any) -> None:
        """Adds and prints a row."""
        where = {"limit": self.limit, "link": self.link, **more}
        result = Result(self.case.name, work, way, peak=max(each.peak for each in ended), **where)
        self.results.append(result)
        print(line_of(result), flush=True)


def _requests(hosts: Sequence[str]) -> list[WorkerRequest]:
    secret = KeyPair.new().secret.hex()
    requests = []
    for rank, host in enumerate(hosts):
        name, port = host.rsplit(":", 1)
        requests.append(
            WorkerRequest(
                server=hosts[0],
                rank=rank,
                world_size=len(hosts),
                run_id="memory-limits",
                name=f"node {rank}",
                bind=f"{name}:{int(port) + 1}",
                member_bind=f"{name}:{int(port) + 2}",
                ring_bind=f"{name}:{int(port) + 1}",
                timeout=120.0,
                secret=secret,
                machine_share=1.0,
                collective=asdict(CollectiveConfig()),
            )
        )
    return requests


HEADER = """\
| model | what | nodes | limit, GB | peak, GB | tokens/s | efficiency | formula | result |
| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | --- |"""


def line_of(result: Result) -> str:
    """The row of the table."""
    cells = [
        result.model,
        result.work,
        f"{result.way}{f', {result.link}' if result.link else ''}",
        "none" if result.limit is None else f"{result.limit / 1e9:.2f}",
        f"{result.peak / 1e9:.2f}",
        f"{result.rate:.2f}" if result.rate else "-",
        "-" if result.efficiency is None else f"{result.efficiency:.2f}",
        "-" if result.formula is None else f"{result.formula:.2f}",
        _outcome(result),
    ]
    return "| " + " | ".join(cells) + " |"


def _outcome(result: Result) -> str:
    if result.difference is None:
        return result.note
    if result.work == "answer":
        return "same tokens" if result.difference == 0 else "OTHER TOKENS"
    return "same bits" if result.difference == 0 else f"within {result.difference:.0e}"


def write(results: Sequence[Result]) -> None:
    """Keeps the results, and writes the table of all."""
    kept = [Result(**row) for row in json.loads(RESULTS.read_text())] if RESULTS.exists() else []
    rows = {result.key: result for result in [*kept, *results]}
    RESULTS.write_text(json.dumps([asdict(row) for row in rows.values()], indent=1) + "\n")
    lines = "\n".join(line_of(row) for row in rows.values())
    before, _, after = PAGE.read_text().split(MARKS)
    PAGE.write_text(f"{before}{MARKS}\n{HEADER}\n{lines}\n{MARKS}{after}")


if __name__ == "__main__":
    main()
