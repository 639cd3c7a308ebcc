"""Tokens a second of answers over a cluster of processes here, beside mlx-lm's stream_generate in one process.

    python benchmarks/generation.py [--nodes 2] [--answers 1 2 4] [--tokens 64] [--prompt-tokens 128] [--rounds 3]
        [--model FOLDER]

Both take turns in the same run; a figure is the median of its rounds, and a ratio that of the ratios of rounds. mlx-lm
computes the answers one after the other, on the threads of one node (``OPENBLAS_NUM_THREADS``, by default the cores
divided by the nodes): the goal of a pipeline is one node's speed with one answer, and ``--nodes`` times that with as
many answers. A prompt is computed in chunks of 512 tokens, so that a long one fills the pipeline by itself.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from macft.model.settings import ModelConfig
    from macft.run.generation.leader import GenerationLeader

GOAL = 0.9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--answers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", type=Path, help="default: the bundled model")
    arguments = parser.parse_args()
    # Before NumPy loads OpenBLAS: this process is a node like the others.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // arguments.nodes)))

    import numpy as np

    from macft.collective.settings import CollectiveConfig
    from macft.launch.generation.cluster import generation_cluster
    from macft.model.fetch.bundled import ensure_bundled
    from macft.model.settings import ModelConfig
    from macft.run.generation.leader import GenerationLeader, dismiss
    from macft.run.generation.rank import DistributedModel, GenerationRank
    from macft.topology.settings import TopologyConfig

    model = ModelConfig(path=str(arguments.model or ensure_bundled()))
    generator = np.random.default_rng(0)
    topology = TopologyConfig(kind="local", nodes=arguments.nodes)
    with generation_cluster(topology, CollectiveConfig()) as collective:
        rank = GenerationRank(collective, name="here", machine_share=1 / arguments.nodes)
        cluster = GenerationLeader(
            rank, DistributedModel.of(model, None, "0.95"), together=max(arguments.answers), tell=print
        )
        alone = alone_in_this_process(model, arguments.tokens)
        spread = over_the_cluster(cluster, arguments.tokens)
        print(f"{arguments.nodes} nodes, prompts of {arguments.prompt_tokens} tokens, {arguments.tokens} of an answer")
        print("answers  mlx-lm tok/s  cluster tok/s  ratio   of the goal")
        for count in arguments.answers:
            prompts = [generator.integers(5, 4000, arguments.prompt_tokens).tolist() for _ in range(count)]
            assert alone(prompts) == spread(prompts), "the answers differ"  # also warms both up
            rounds = [(timed(alone, prompts), timed(spread, prompts)) for _ in range(arguments.rounds)]
            tokens = count * arguments.tokens
            rates = [statistics.median(tokens / each[side] for each in rounds) for side in (0, 1)]
            ratio = statistics.median(one / other for one, other in rounds)
            share = ratio / min(count, arguments.nodes)
            word = "reached" if share >= GOAL else "missed"
            print(f"{count:7} {rates[0]:13.1f} {rates[1]:14.1f} {ratio:6.2f} {share:9.2f}  {word}")
        cluster.close()
        dismiss(rank)


Answerer = Callable[[Sequence[list[int]]], list[list[int]]]


def alone_in_this_process(model: ModelConfig, tokens: int) -> Answerer:
    """mlx-lm's answers, one after the other, with the whole model in this process."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    from macft.config.execution import inference_execution
    from macft.model.backends.choose import make_backend
    from macft.model.fetch.resolve import resolve
    from macft.model.load import load

    folder = resolve(model)
    execution = inference_execution(model, folder)
    loaded = load(model, folder, execution)
    loaded.model.eval()

    def answer(prompts: Sequence[list[int]]) -> list[list[int]]:
        with make_backend(execution.padded()).installed(loaded.model):
            return [
                [int(token) for token, _ in generate_step(mx.array(prompt), loaded.model, max_tokens=tokens)]
                for prompt in prompts
            ]

    return answer


def over_the_cluster(cluster: GenerationLeader, tokens: int) -> Answerer:
    """The answers of all stages, at the same time; none ends before it has all its tokens."""
    from macft.generation.tasks import Options

    def answer(prompts: Sequence[list[int]]) -> list[list[int]]:
        begun = [cluster.pipeline.begin(each, Options(), most_tokens=tokens, stop_tokens=()) for each in prompts]
        found: dict[int, list[int]] = {number: [] for number in begun}
        while not cluster.pipeline.is_idle:
            for new in cluster.advance():
                assert new.outcome.token is not None
                found[new.answer].append(new.outcome.token)
        return list(found.values())

    return answer


def timed(answer: Answerer, prompts: Sequence[list[int]]) -> float:
    """Seconds that the answers take."""
    started = time.perf_counter()
    answer(prompts)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
