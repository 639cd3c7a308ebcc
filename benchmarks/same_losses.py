"""Does a change keep the numbers? Short training runs of this checkout and of another one, compared bit by bit.

    python benchmarks/same_losses.py OTHER_CHECKOUT [--only NAME ...] [--tolerance 0]
    python benchmarks/same_losses.py --save FILE.json [--only NAME ...]
    python benchmarks/same_losses.py --against FILE.json [--only NAME ...] [--tolerance 0]
    python benchmarks/same_losses.py --list

Each configuration runs as `python -m macft.train` with the source of either checkout. Interpreter, model, rows, seed
and settings are the same; BLAS has one thread; nothing is fetched. Loss, gradient norm, learning rate and token counts
of each step, the validation losses and the trained weights are read from the run's folder. `--save` keeps the figures
of this checkout; `--against` compares with them instead of running another checkout. Bits can only be the same on one
machine with the same packages.

The model is a random Llama of two blocks with a byte-level tokenizer, made once for both sides; the configuration
`bundled` trains SmolLM2-135M-Instruct. Differences of losses and norms are relative, the largest of all steps. The
difference of the weights is the largest absolute one, divided by the L2 norm of all trained weights. The exit status is
1 if a difference is larger than `--tolerance`, or if a run fails. The idea is that of torchtitan's
`scripts/loss_compare.py`.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

THIS_CHECKOUT = Path(__file__).resolve().parents[1]
TIMEOUT = 900.0
"""Seconds that one run may take. MLX compiles its fused kernels with a C++ compiler the first time, which is slow."""


@dataclass(frozen=True)
class Configuration:
    """A run to compare: overrides of `macft.train` besides those of COMMON; ``{inputs}`` is the folder of make_inputs.

    ``resumed`` are the overrides with which the finished run is resumed; () for a run that isn't.
    """

    about: str
    overrides: tuple[str, ...]
    resumed: tuple[str, ...] = ()


COMMON = (
    "training.batch_size=6",
    "training.steps=6",
    "training.eval_every=3",
    "training.save_every=0",
    "training.export=last",
    "training.metric_rows=0",
    "optimizer.learning_rate=2e-3",
    "optimizer.warmup_steps=1",
    "report.console=false",
    "report.tensorboard=false",
    "thermal=off",
)
MODEL = ("model=custom", "model.path='{inputs}/float32'", "adapter.rank=4")
ROWS = ("dataset=custom", "dataset.path='{inputs}/rows'", "dataset.mask_prompt=true", "dataset.max_seq_length=256")
TINY = MODEL + ROWS
TWO = (*TINY, "topology=local", "topology.nodes=2", "topology.shares=equal")

CONFIGURATIONS = {
    "one-node": Configuration("LoRA on all linear layers", TINY),
    "two-nodes": Configuration("the same on two ranks", TWO),
    "lora": Configuration(
        "LoRA on two projections of the last block, prompts are targets too",
        (*TINY, "adapter.num_layers=1", "adapter.targets=[q_proj,v_proj]", "dataset.mask_prompt=false"),
    ),
    "dora": Configuration("DoRA", (*TINY, "adapter=dora")),
    "full": Configuration("the weights of both blocks", (*TINY, "adapter=full", "adapter.num_layers=2")),
    "dropout": Configuration("LoRA with dropout", (*TINY, "adapter.dropout=0.1")),
    "accumulation": Configuration("micro-batches of two rows", (*TINY, "training.micro_batch_size=2")),
    "packed": Configuration(
        "packed rows with common prefixes: the SQL questions",
        (*MODEL, "dataset=sql", "dataset.max_seq_length=1024", "training.packing=true", "training.eval_rows=6"),
    ),
    "padded": Configuration("padded rows", (*TINY, "training.packing=false")),
    "grad-checkpoint": Configuration("activations recomputed", (*TINY, "training.recompute=blocks")),
    "compiled": Configuration(
        "compiled, packed: MLX operations only", (*TINY, "training.compile=true", "training.packing=true")
    ),
    "compiled-padded": Configuration(
        "compiled, padded, with dropout",
        (*TINY, "training.compile=true", "training.packing=false", "adapter.dropout=0.1"),
    ),
    "quantized": Configuration("a float32 model, quantised to 4 bits", (*TINY, "model.quantization=4bit")),
    "quantized-kept": Configuration(
        "a 4-bit checkpoint, kept as it is", (*TINY, "model.path='{inputs}/4bit'", "model.quantization=keep")
    ),
    "bfloat16": Configuration("a base in bfloat16", (*TINY, "model.precision=bfloat16")),
    "resumed": Configuration(
        "three steps, then resumed for three more; the best adapter is kept",
        (*TINY, "training.steps=3", "training.export=best"),
        ("training.steps=6",),
    ),
    "resumed-two-nodes": Configuration(
        "resumed on two ranks, with dropout", (*TWO, "training.steps=3", "adapter.dropout=0.1"), ("training.steps=6",)
    ),
    "diloco": Configuration(
        "DiLoCo: two ranks, synchronised every three steps", (*TWO, "training.sync=diloco", "training.inner_steps=3")
    ),
    "int8": Configuration("two ranks, gradients in 8 bits", (*TWO, "collective.codec=int8")),
    "powersgd": Configuration("two ranks, gradients as low-rank factors", (*TWO, "collective.codec=powersgd")),
    "bundled": Configuration(
        "SmolLM2-135M-Instruct, LoRA on the last two blocks, three steps",
        ("+recipe=smoke", "training.batch_size=2", "training.steps=3", "training.eval_rows=4"),
    ),
}


STEP_FIELDS = ("step", "loss", "grad_norm", "learning_rate", "target_tokens", "tokens")
VALIDATION_FIELDS = ("step", "loss", "target_tokens")


@dataclass(frozen=True)
class Figures:
    """What a run computed: the values of each step and each validation, and the trained weights.

    ``adapter_sha256`` is that of the run's own summary, ``tensors_sha256`` that of names, types, shapes and values in
    adapters.safetensors. ``weights`` holds these values as float32, in the order of their names.
    """

    steps: list[dict[str, Any]]
    validations: list[dict[str, Any]]
    adapter_sha256: str
    tensors_sha256: str
    weights: NDArray[np.float32]

    def to_json(self) -> dict[str, Any]:
        """The figures in JSON's types; the weights in base64."""
        weights = base64.b64encode(self.weights.astype("<f4").tobytes()).decode()
        return {**vars(self), "weights": weights}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Figures:
        """The opposite of :meth:`to_json`."""
        weights = np.frombuffer(base64.b64decode(values["weights"]), "<f4")
        return Figures(**{**values, "weights": weights})


class RunFailed(Exception):
    """A run didn't end well, or its folder lacks what is compared; the text is one line."""


# Running


def compute_figures(checkout: Path, configuration: Configuration, inputs: Path, folder: Path) -> Figures:
    """Trains in ``folder`` with the source of ``checkout``. Raises RunFailed."""
    overrides = [text.replace("{inputs}", str(inputs)) for text in (*COMMON, *configuration.overrides)]
    train(checkout, [*overrides, f"hydra.run.dir='{folder}'"], inputs)
    if configuration.resumed:
        train(checkout, [f"+resume='{folder}'", *configuration.resumed], inputs)
    return read_figures(folder)


def train(checkout: Path, overrides: Sequence[str], cwd: Path) -> None:
    """Runs `python -m macft.train` to its end. Raises RunFailed with the last line of its error."""
    process = subprocess.Popen(
        [sys.executable, "-m", "macft.train", *overrides],
        cwd=cwd,
        env=environment(checkout, cwd),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that the ranks of a run that takes too long can be ended with it
    )
    try:
        output, errors = process.communicate(timeout=TIMEOUT)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise RunFailed(f"not finished after {TIMEOUT:.0f} s") from error
        raise
    if process.returncode:
        lines = [line.strip() for line in (errors.strip() or output.strip()).splitlines()]
        lines = [line for line in lines if line and "HYDRA_FULL_ERROR" not in line]  # Hydra's hint comes last
        raise RunFailed(f"exit status {process.returncode}: {lines[-1] if lines else 'no message'}")


def environment(checkout: Path, cwd: Path) -> dict[str, str]:
    """The variables of a run: ``checkout``'s source first, and nothing of the user's that could change numbers."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MACFT_", "MLX_", "PYTHON"))}
    return kept | {
        "PYTHONPATH": str(checkout / "src"),
        "OPENBLAS_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "MACFT_CONFIG": str(cwd / "no-user-configuration"),
    }


def check_source(checkout: Path, cwd: Path) -> None:
    """Ends the program unless this interpreter imports macft from ``checkout`` when asked to."""
    command = [sys.executable, "-c", "import macft; print(macft.__file__)"]
    done = subprocess.run(command, cwd=cwd, env=environment(checkout, cwd), capture_output=True, text=True, check=False)
    path = Path(done.stdout.strip() or "nothing")
    if done.returncode or not path.resolve().is_relative_to((checkout / "src" / "macft").resolve()):
        reason = done.stderr.strip().splitlines()[-1] if done.returncode else f"{path} is imported instead"
        raise SystemExit(f"error: {checkout}: macft can't be imported from its src folder: {reason}")


# Reading a run's folder


def read_figures(folder: Path) -> Figures:
    """The figures in a run's metrics.jsonl, summary.json and adapters. Raises RunFailed if one is missing."""
    import mlx.core as mx

    try:
        events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        steps = [{name: event[name] for name in STEP_FIELDS} for event in events if event["type"] == "step_done"]
        validations = [
            {name: event[name] for name in VALIDATION_FIELDS} for event in events if event["type"] == "evaluated"
        ]
        adapter_sha256 = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["adapter_sha256"]
        tensors: Any = mx.load(str(folder / "adapters" / "adapters.safetensors"))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        what = f"metrics.jsonl or summary.json lacks {error}" if isinstance(error, KeyError) else str(error)
        raise RunFailed(what) from error
    digest, weights = hashlib.sha256(), []
    for name, value in sorted(tensors.items()):
        array = np.asarray(value.astype(mx.float32))
        digest.update(f"{name} {value.dtype} {array.shape}\n".encode() + array.tobytes())
        weights.append(array.ravel())
    if not steps or not weights:
        raise RunFailed("it made no step, or left no weights")
    return Figures(steps, validations, adapter_sha256, digest.hexdigest(), np.concatenate(weights))


# Comparing


@dataclass(frozen=True)
class Comparison:
    """How far apart two runs are: differences by the name of what differs; ``reason`` if they can't be compared."""

    differences: Mapping[str, float]
    reason: str = ""

    @property
    def is_identical(self) -> bool:
        """Whether all figures are the same bits."""
        return not self.reason and not self.differences

    def is_within(self, tolerance: float) -> bool:
        """Whether no difference is larger than ``tolerance``; 0 asks for the same bits."""
        if self.reason or not tolerance:
            return self.is_identical
        return all(value <= tolerance for value in self.differences.values())

    def __str__(self) -> str:
        parts = [f"{name} {value:.1e}" for name, value in self.differences.items()]
        return self.reason or ", ".join(parts) or "identical"


def compare(ours: Figures, theirs: Figures) -> Comparison:
    """The differences of ``ours`` from ``theirs``. One of 0 means that only a digest differs."""
    for what, mine, other in (
        ("steps", ours.steps, theirs.steps),
        ("validations", ours.validations, theirs.validations),
    ):
        for name in ("step", "target_tokens", "tokens"):
            columns = [[row.get(name) for row in rows] for rows in (mine, other)]
            if columns[0] != columns[1]:
                return Comparison({}, f"other {what}: {name} {columns[0]} against {columns[1]}")
    pairs = {
        "loss": (ours.steps, theirs.steps, "loss"),
        "norm": (ours.steps, theirs.steps, "grad_norm"),
        "learning rate": (ours.steps, theirs.steps, "learning_rate"),
        "validation": (ours.validations, theirs.validations, "loss"),
    }
    differences = {}
    for name, (mine, other, key) in pairs.items():
        values = [(a[key], b[key]) for a, b in zip(mine, other, strict=True) if a[key] != b[key]]
        if values:
            differences[name] = max(relative(a, b) for a, b in values)
    if ours.tensors_sha256 != theirs.tensors_sha256:
        if len(ours.weights) != len(theirs.weights):
            return Comparison(differences, f"{len(ours.weights)} trained weights against {len(theirs.weights)}")
        apart = np.abs(ours.weights.astype(np.float64) - theirs.weights).max()
        difference = float(apart / max(float(np.linalg.norm(theirs.weights.astype(np.float64))), 1e-30))
        what = "weights" if difference else "names or types of tensors"
        differences[what] = difference if math.isfinite(difference) else math.inf
    elif ours.adapter_sha256 != theirs.adapter_sha256:
        differences["adapter_sha256 in summary.json"] = 0.0
    return Comparison(differences)


def relative(a: Any, b: Any) -> float:
    """The relative difference of two numbers; infinite where one isn't finite (metrics.jsonl has a string there)."""
    if isinstance(a, str) or isinstance(b, str):
        return math.inf
    return float(abs(a - b) / max(abs(a), abs(b)))


# Models and rows


def make_inputs(folder: Path) -> str:
    """Writes the models `float32` and `4bit` and the dataset `rows`; returns a sha256 of all files."""
    write_model(folder / "float32", bits=0)
    write_model(folder / "4bit", bits=4)
    write_rows(folder / "rows")
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*/*")):
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def write_model(folder: Path, *, bits: int) -> None:
    """A random Llama of two blocks; with ``bits`` its matrices are quantised as mlx-lm does it."""
    import mlx.core as mx

    hidden, inner, key_value, vocabulary = 64, 128, 32, 2048
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "vocab_size": vocabulary,
    }
    shapes = {"model.embed_tokens": (vocabulary, hidden)}
    for block in ("model.layers.0", "model.layers.1"):
        shapes |= {f"{block}.self_attn.{name}_proj": (hidden, hidden) for name in "qo"}
        shapes |= {f"{block}.self_attn.{name}_proj": (key_value, hidden) for name in "kv"}
        shapes |= {f"{block}.mlp.{name}_proj": (inner, hidden) for name in ("gate", "up")}
        shapes[f"{block}.mlp.down_proj"] = (hidden, inner)
    generator = np.random.default_rng(0)
    tensors: dict[str, Any] = {}
    for name, shape in shapes.items():
        values = mx.array(generator.standard_normal(shape, np.float32) / np.float32(math.sqrt(shape[1])))
        parts = mx.quantize(values, 64, bits) if bits else (values,)
        tensors |= {f"{name}.{part}": value for part, value in zip(("weight", "scales", "biases"), parts, strict=False)}
    norms = [f"model.layers.{n}.{name}_layernorm" for n in (0, 1) for name in ("input", "post_attention")]
    tensors |= {f"{name}.weight": mx.ones(hidden) for name in (*norms, "model.norm")}
    config |= {"quantization": {"group_size": 64, "bits": bits}} if bits else {}
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "mlx"})
    ids = write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": ids["<|im_end|>"]}))


def write_tokenizer(folder: Path) -> dict[str, int]:
    """A tokenizer whose tokens are bytes, with a ChatML template; returns the vocabulary."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: n for n, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return vocabulary


def write_rows(folder: Path) -> None:
    """Prompt/completion rows of 30 to 200 tokens."""
    words = ["red", "seven", "river", "lamp", "north", "glass", "stone", "quiet", "paper", "cloud"]
    source = random.Random(5)
    folder.mkdir()
    for split, count in (("train", 24), ("valid", 8)):
        with (folder / f"{split}.jsonl").open("w") as file:
            for _ in range(count):
                text = source.choices(words, k=source.randint(1, 24))
                row = {"prompt": f"Repeat: {' '.join(text)}", "completion": " ".join(text[: source.randint(1, 12)])}
                file.write(json.dumps(row) + "\n")


# The command


class Saved:
    """A file of figures that an earlier call left.

    Raises:
        SystemExit: it can't be read.
    """

    def __init__(self, path: Path):
        try:
            self._content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            self._runs: dict[str, Any] = self._content["configurations"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"error: {path} can't be read as figures of this script: {error}") from error

    def figures(self, name: str, inputs_sha256: str) -> Figures:
        """Those of the configuration ``name``. Raises RunFailed if the file's can't be compared."""
        if name not in self._runs:
            raise RunFailed("not in the file")
        values = self._runs[name]
        if values["settings"] != settings_of(CONFIGURATIONS[name]) or self._content["inputs_sha256"] != inputs_sha256:
            raise RunFailed("the file has figures of other settings, model or rows; save it again")
        return Figures.from_json(values["figures"])

    def different_packages(self) -> list[str]:
        """What is another version here than when the file was written."""
        then: dict[str, str] = self._content["versions"]
        return [f"{name} {then.get(name)} then, {now} now" for name, now in versions().items() if then.get(name) != now]


def save(path: Path, results: Mapping[str, Figures], inputs_sha256: str) -> None:
    """Writes ``results`` for --against."""
    runs = {
        name: {"settings": settings_of(CONFIGURATIONS[name]), "figures": figures.to_json()}
        for name, figures in results.items()
    }
    content = {"versions": versions(), "inputs_sha256": inputs_sha256, "configurations": runs}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def settings_of(configuration: Configuration) -> list[str]:
    """All overrides of a configuration."""
    return [*COMMON, *configuration.overrides, "resumed", *configuration.resumed]


def versions() -> dict[str, str]:
    """What else bits depend on."""
    packages = {name: importlib.metadata.version(name) for name in ("mlx", "mlx-lm", "numpy")}
    return {"platform": platform.platform(), "python": platform.python_version(), **packages}


def main() -> int:
    """Runs and compares what the command line asks for; returns the exit status."""
    options = read_command_line()
    if options.list:
        for name, configuration in CONFIGURATIONS.items():
            print(f"{name:18} {configuration.about}")
        return 0
    saved = Saved(options.against) if options.against else None
    for line in saved.different_packages() if saved else []:
        print(f"note: {line}; bits may differ for that reason")
    chosen = options.only or list(CONFIGURATIONS)
    compares = saved is not None or options.other is not None
    results: dict[str, Figures] = {}
    identical = failed = 0
    with tempfile.TemporaryDirectory(prefix="same-losses-") as scratch:
        inputs = Path(scratch).resolve() / "inputs"
        inputs.mkdir()
        inputs_sha256 = make_inputs(inputs)
        for checkout in (THIS_CHECKOUT, options.other):
            if checkout is not None:
                check_source(checkout, inputs)
        print(f"{'configuration':18} {'steps':>5} {'seconds':>7}  {'result' if compares else 'adapter sha256'}")
        for name in chosen:
            configuration, started = CONFIGURATIONS[name], time.perf_counter()
            side, steps, result = "this checkout", "", ""
            try:
                ours = compute_figures(THIS_CHECKOUT, configuration, inputs, inputs.parent / f"{name}-this")
                results[name], steps, result = ours, str(len(ours.steps)), ours.adapter_sha256[:16]
                if saved is not None:
                    side = str(options.against)
                    comparison = compare(ours, saved.figures(name, inputs_sha256))
                elif options.other is not None:
                    side = str(options.other)
                    theirs = compute_figures(options.other, configuration, inputs, inputs.parent / f"{name}-other")
                    comparison = compare(ours, theirs)
                if compares:
                    result = str(comparison)
                    identical += comparison.is_identical
                    failed += not comparison.is_within(options.tolerance)
            except RunFailed as error:
                result = f"failed in {side}: {error}"
                failed += 1
            print(f"{name:18} {steps:>5} {time.perf_counter() - started:7.1f}  {result}", flush=True)
    if options.save:
        save(options.save, results, inputs_sha256)
        print(f"saved: {options.save}")
    if compares:
        print(f"{identical} of {len(chosen)} configurations are bit-identical")
    return 1 if failed else 0


def read_command_line() -> argparse.Namespace:
    """The options; ``other`` is a checkout's folder or None."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", nargs="?", type=Path, metavar="OTHER_CHECKOUT", help="the checkout to compare with")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these configurations")
    parser.add_argument("--list", action="store_true", help="list the configurations")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write this checkout's figures")
    parser.add_argument("--against", type=Path, metavar="FILE", help="compare with figures that --save wrote")
    parser.add_argument(
        "--tolerance", type=float, default=0.0, help="largest difference allowed (default: no other bit)"
    )
    options = parser.parse_args()
    if options.list:
        return options
    if options.other is not None and options.against is not None:
        parser.error("give OTHER_CHECKOUT or --against, not both")
    if options.other is None and options.against is None and options.save is None:
        parser.error("give OTHER_CHECKOUT, --against or --save")
    for name in options.only or []:
        if name not in CONFIGURATIONS:
            parser.error(f"--only: '{name}' is not one of {', '.join(CONFIGURATIONS)}")
    if options.other is not None:
        options.other = options.other.resolve()
        if not (options.other / "src" / "macft").is_dir():
            parser.error(f"{options.other} is not a checkout of macft: it has no src/macft")
    return options


if __name__ == "__main__":
    sys.exit(main())
