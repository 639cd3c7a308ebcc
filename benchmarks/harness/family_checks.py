"""What macft must do right with a model of any family: checks against mlx-lm's own model and LoRA layers.

Each check takes a :class:`Case`, a tiny model of a family, and returns a word for the table: "yes", or "-" where it
has nothing to check. It raises :class:`Failed` with one line where macft is wrong. The references are computed by
mlx-lm's model and ``nn.value_and_grad`` alone, row by row, so that padding and packing play no part in them.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import load_model

from macft.collective.solo import Solo
from macft.data.batch import collate
from macft.data.formats import Row
from macft.data.tokenize import prompt_tokens
from macft.errors import ConfigError
from macft.evaluation.answers import score_answers
from macft.evaluation.batched import greedy_answers
from macft.evaluation.chat import Chat, ModelAnswers, Sampling
from macft.evaluation.exact_match import ExactMatch
from macft.evaluation.question import question
from macft.model.adapters.adapt import Adaptation, adapt
from macft.model.adapters.attach import attach
from macft.model.adapters.files import load_adapter_weights, save_adapter
from macft.model.adapters.fuse import fuse
from macft.model.adapters.settings import AdapterConfig
from macft.model.backends.choose import can_pack, make_backend
from macft.model.blocks.cut_model import CutModel
from macft.model.execution import Execution, recomputations
from macft.model.load import LoadedModel, load
from macft.model.settings import ModelConfig
from macft.parallel.shares import DataShard
from macft.training.gradients.gradient import GradientComputer
from macft.training.gradients.step_gradient import make_step_gradient
from macft.training.loss import TokenLoss
from macft.training.validation import validation_loss

from .execution import execution_with
from .families import TARGETS

LOSS_TOLERANCE = 1e-6
"""Largest relative difference of a summed float32 loss."""
GRADIENT_TOLERANCE = 1e-4
"""Largest L2 norm of a gradient's difference, relative to the gradient's own."""
ANSWER_TOKENS = 6
FAILED = "FAILED: "
RANK, SCALE = 4, 10.0
SEED, STEP = 11, 3


class Failed(Exception):
    """macft is wrong about a family; one line."""


def seven_rows() -> list[Row]:
    """Rows of 4 to 45 tokens, with a prompt each but one; two pairs begin alike, one is the beginning of another."""
    generator = np.random.default_rng(3)
    start, other, long = (generator.integers(3, 480, count) for count in (11, 6, 45))
    tokens = [
        generator.integers(3, 480, 4),
        np.concatenate([start, generator.integers(3, 480, 10)]),
        np.concatenate([start, generator.integers(3, 480, 3)]),
        np.concatenate([other, generator.integers(3, 480, 18)]),
        np.concatenate([other, generator.integers(3, 480, 18)]),
        long,
        long[:30],
    ]
    prompts = (1, 13, 11, 6, 3, 20, 0)
    return [Row(row.astype(np.int32), prompt) for row, prompt in zip(tokens, prompts, strict=True)]


@dataclass(frozen=True)
class Sums:
    """Summed loss in nats over the target tokens of rows, and its gradient by parameter name."""

    loss: float
    gradient: dict[str, np.ndarray]

    @property
    def norm(self) -> float:
        """L2 norm of the whole gradient."""
        return float(np.sqrt(sum(float((value.astype(np.float64) ** 2).sum()) for value in self.gradient.values())))

    def compare(self, expected: Sums, what: str) -> None:
        """Raises Failed where these are not the ``expected`` sums."""
        if not np.isfinite(self.loss):
            raise Failed(f"{what}: the loss is {self.loss}")
        if self.gradient.keys() != expected.gradient.keys():
            raise Failed(f"{what}: {_difference(self.gradient, expected.gradient)}")
        loss = abs(self.loss - expected.loss) / abs(expected.loss)
        if loss > LOSS_TOLERANCE:
            raise Failed(f"{what}: the loss is {self.loss:.6f}, not {expected.loss:.6f}")
        differences = {name: value - expected.gradient[name] for name, value in self.gradient.items()}
        error = Sums(0.0, differences).norm / expected.norm
        if not error <= GRADIENT_TOLERANCE:
            worst = max(differences, key=lambda name: float(np.abs(differences[name]).max()))
            raise Failed(f"{what}: the gradient differs by {error:.1e} of its norm, most in {worst}")


class Case:
    """A family's tiny model in ``folder``, with rows to train on."""

    def __init__(self, name: str, folder: Path, kernels: Sequence[str] = ("mlx", "cpu")):
        self.name = name
        self.folder = folder
        self.kernels = kernels
        self.targets = TARGETS.get(name, [])
        self.rows = seven_rows()
        self._packs: dict[str, bool] = {}

    def load(self, execution: Execution | None = None) -> LoadedModel:
        """The model as macft loads it, anew each time."""
        return load(ModelConfig(path=str(self.folder)), self.folder, execution or execution_with("mlx"))

    def plain(self, *, quantized: bool = False) -> nn.Module:
        """The model as mlx-lm loads it, frozen."""
        model, config = load_model(self.folder)
        model = _quantized(model, config) if quantized else model
        model.freeze()
        return model

    def packs(self, kernels: str) -> bool:
        """Whether a run with these kernels packs rows."""
        if kernels not in self._packs:
            self._packs[kernels] = can_pack(self.load().model, execution_with(kernels, packing=True))
        return self._packs[kernels]

    @cached_property
    def reference(self) -> Sums:
        """mlx-lm's loss and gradient with the layers that macft adapts."""
        return self.reference_of("lora")

    def reference_of(self, kind: str, *, quantized: bool = False) -> Sums:
        """The same for an adapter of this kind."""
        settings = self.adapted(kind).adaptation.mlx_lm_config
        model = self.plain(quantized=quantized)
        linear_to_lora_layers(model, settings["num_layers"], settings["lora_parameters"], use_dora=kind == "dora")
        randomize(model)
        return plain_sums(model, self.rows)

    def adapted(self, kind: str = "lora", *, dropout: float = 0.0, execution: Execution | None = None) -> Adapted:
        """macft's model with an adapter of random values on all blocks."""
        loaded = self.load(execution)
        config = AdapterConfig(type=kind, rank=RANK, scale=SCALE, dropout=dropout, targets=self.targets)
        adaptation = adapt(loaded.model, config, seed=SEED)
        randomize(loaded.model)
        return Adapted(loaded, adaptation)


@dataclass(frozen=True)
class Adapted:
    """A loaded model with its adapter."""

    loaded: LoadedModel
    adaptation: Adaptation

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self.loaded.model

    def sums(self, rows: Sequence[Row], kernels: str, ids: Sequence[int] | None = None, **fields: Any) -> Sums:
        """The sums of ``rows``, numbered ``ids``, as a training step of macft computes them."""
        execution = execution_with(kernels, dropout=self.adaptation.dropout_keys.in_use, **fields)
        backend = make_backend(execution)
        with backend.installed(self.model):
            compute = GradientComputer(self.model, backend, execution, self.adaptation.dropout_keys, seed=SEED)
            result = compute(STEP, [collate(rows, np.arange(len(rows)) if ids is None else np.array(ids))])
            gradient = {name: np.array(value) for name, value in result.gradient.items()}
            return Sums(result.loss_sum, gradient)


def randomize(model: nn.Module) -> None:
    """Random values for the adapter, the same for the same names: LoRA's B begins as zero, which hides mistakes."""
    mx.random.seed(5)
    values = []
    for name, value in sorted(tree_flatten(model.trainable_parameters())):
        noise = 0.1 * mx.random.normal(value.shape)
        values.append((name, value * (1.0 + noise) if name.endswith(".m") else noise))
    model.load_weights(values, strict=False)
    mx.eval(model.parameters())


def plain_sums(model: nn.Module, rows: Sequence[Row]) -> Sums:
    """The sums as mlx-lm's model gives them, row by row."""
    model.train()

    def loss(row: Row) -> mx.array:
        tokens = mx.array(row.tokens)[None]
        first = max(row.prompt_length, 1)
        logits = model(tokens[:, :-1])[:, first - 1 :]
        return nn.losses.cross_entropy(logits.astype(mx.float32), tokens[:, first:], reduction="sum")

    total, sums = 0.0, {}
    for row in rows:
        value, gradient = nn.value_and_grad(model, loss)(row)
        total += float(value.item())
        for name, array in tree_flatten(gradient):
            sums[name] = sums.get(name, 0.0) + np.array(array, dtype=np.float64)
    return Sums(total, sums)


def check_layers(case: Case) -> str:
    """The trained parameters are those of mlx-lm's default; where that fails, macft names other ones."""
    model = case.plain()
    if case.targets:
        try:
            adapt(case.load().model, AdapterConfig(rank=RANK, scale=SCALE), seed=SEED)
        except ConfigError as error:
            if "adapter.targets=[" in str(error):
                return "targets"
            raise
        raise Failed("the default layers are taken, which mlx-lm's code can't train")
    linear_to_lora_layers(model, len(model.layers), {"rank": RANK, "scale": SCALE, "dropout": 0.0})
    expected = {name: value.shape for name, value in tree_flatten(model.trainable_parameters())}
    found = {name: value.shape for name, value in tree_flatten(case.adapted().model.trainable_parameters())}
    if found != expected:
        raise Failed(_difference(found, expected))
    return "yes"


def check_experts(case: Case) -> str:
    """The experts of a mixture are among them."""
    model = case.plain()
    experts = [name for name, layer in model.named_modules() if isinstance(layer, SwitchLinear | QuantizedSwitchLinear)]
    if not experts:
        return "-"
    trained = {name for name, _ in tree_flatten(case.adapted().model.trainable_parameters())}
    missing = [name for name in experts if f"{name}.lora_a" not in trained]
    if missing:
        raise Failed(f"{len(missing)} of {len(experts)} experts' layers are not trained, {missing[0]} first")
    return "yes"


def check_gradient(case: Case) -> str:
    """Loss and gradient of padded rows, by each backend."""
    for kernels in case.kernels:
        case.adapted().sums(case.rows, kernels).compare(case.reference, kernels)
    return "yes"


def check_packing(case: Case) -> str:
    """The same of packed rows."""
    packing = [kernels for kernels in case.kernels if case.packs(kernels)]
    for kernels in packing:
        case.adapted().sums(case.rows, kernels, packing=True).compare(case.reference, kernels)
    return "yes" if packing else "no"


def check_recompute(case: Case) -> str:
    """The same with blocks that are computed again in the backward pass, as a whole or what is cheap of them."""
    for kernels in case.kernels:
        for recompute in recomputations(kernels)[1:]:
            sums = case.adapted().sums(
                case.rows, kernels, recompute=recompute, packing=case.packs(kernels), max_scores=2048
            )
            sums.compare(case.reference, f"{kernels}, {recompute}")
    return "yes"


def check_stream(case: Case) -> str:
    """The same block by block, each read from disk when it is computed; "no" where the model can't be cut."""
    for kernels in case.kernels:
        execution = execution_with(kernels, packing=case.packs(kernels)).streamed(())
        loaded = case.load(execution)
        assert loaded.streamed is not None
        if CutModel(loaded.model).obstacle(mx.array([[5, 7, 11]])):
            return "no"
        config = AdapterConfig(type="lora", rank=RANK, scale=SCALE, targets=case.targets)
        adaptation = adapt(loaded.model, config, seed=SEED, streamed=loaded.streamed)
        randomize(loaded.model)
        backend = make_backend(execution)
        with backend.installed(loaded.model):
            compute = make_step_gradient(
                loaded.model,
                backend,
                execution,
                adaptation.dropout_keys,
                loaded.streamed,
                seed=SEED,
                bucket_bytes=2**22,
            )
            result = compute(STEP, [collate(case.rows, np.arange(len(case.rows)))])
            found = Sums(result.loss_sum, {name: np.array(value) for name, value in result.gradient.items()})
        found.compare(case.reference, f"{kernels}, stream")
    return "yes"


def check_dropout(case: Case) -> str:
    """A row's masks are the same alone, beside others and in a pack, or dropout is refused."""
    try:
        case.adapted(dropout=0.4)
    except ConfigError as error:
        if str(error).startswith("adapter.dropout:"):
            return "refused"
        raise
    for kernels in case.kernels:
        adapted = case.adapted(dropout=0.4)
        expected = _added(adapted.sums([row], kernels, [number]) for number, row in enumerate(case.rows))
        differences = {name: value - case.reference.gradient[name] for name, value in expected.gradient.items()}
        if Sums(0.0, differences).norm < 0.01 * case.reference.norm:
            raise Failed(f"{kernels}: dropout changes nothing")
        adapted.sums(case.rows, kernels).compare(expected, f"{kernels}, padded")
        if case.packs(kernels):
            adapted.sums(case.rows, kernels, packing=True).compare(expected, f"{kernels}, packed")
    return "yes"


def check_dora(case: Case) -> str:
    """Loss and gradient with DoRA, where mlx-lm has it for this family."""
    settings = case.adapted().adaptation.mlx_lm_config
    model = case.plain()
    try:
        linear_to_lora_layers(model, settings["num_layers"], settings["lora_parameters"], use_dora=True)
        plain_sums(model, case.rows[:1])
    except (ValueError, TypeError, AttributeError, NotImplementedError):
        with contextlib.suppress(ConfigError):
            case.adapted("dora")
            raise Failed("mlx-lm has no DoRA for a layer, and macft does not say so") from None
        return "no"
    reference = case.reference_of("dora")
    for kernels in case.kernels:
        sums = case.adapted("dora").sums(case.rows, kernels, packing=case.packs(kernels))
        sums.compare(reference, kernels)
    return "yes"


def check_quantized(case: Case) -> str:
    """Loss and gradient with weights of four bits, 32 to a group, where mlx-lm can compute them."""
    try:
        mx.eval(case.plain(quantized=True)(mx.array(case.rows[0].tokens)[None]))
    except (ValueError, TypeError):
        return "no"
    execution = execution_with("mlx", bits=4, group_size=32)
    adapted = case.adapted(execution=execution)
    if not adapted.loaded.is_quantized:
        raise Failed("no weight is quantised")
    reference = case.reference_of("lora", quantized=True)
    adapted.sums(case.rows, "mlx", bits=4, group_size=32, packing=case.packs("mlx")).compare(reference, "mlx")
    return "yes"


def check_validation(case: Case) -> str:
    """The validation loss is that of the reference, whatever rows are computed together."""
    targets = sum(row.target_tokens for row in case.rows)
    for kernels in case.kernels:
        adapted = case.adapted()
        execution = execution_with(kernels, packing=case.packs(kernels), evaluation_rows=3)
        backend = make_backend(execution)
        with backend.installed(adapted.model):
            loss = TokenLoss(adapted.model, backend)
            result = validation_loss(
                adapted.model,
                loss,
                execution,
                case.rows,
                Solo(),
                shard=DataShard(0, 1),
                progress=lambda *_: None,
            )
        expected = case.reference.loss / targets
        if result.target_tokens != targets or abs(result.loss - expected) > LOSS_TOLERANCE * expected:
            raise Failed(f"{kernels}: the loss is {result.loss:.6f}, not {expected:.6f}")
    return "yes"


def check_files(case: Case) -> str:
    """mlx-lm loads macft's adapter, and macft mlx-lm's, with the same logits."""
    tokens = mx.array(case.rows[5].tokens)[None]
    adapted = case.adapted()
    folder = case.folder / "adapter"
    save_adapter(folder, adapted.model, adapted.adaptation.mlx_lm_config, model_name=str(case.folder))
    expected = logits(adapted.model, tokens)
    word = "yes"
    if any(name.rsplit(".", 1)[-1].isdigit() for name, _ in tree_flatten(adapted.model.trainable_parameters())):
        word = "macft only"  # mlx-lm does not load adapters that are kept in a list, its own neither
    else:
        _same_logits(logits(load_adapters(case.plain(), str(folder)), tokens), expected, "in mlx-lm")
    attached = case.load().model
    attach(attached, folder)
    _same_logits(logits(attached, tokens), expected, "attached")
    begun = case.load().model
    adapt(begun, AdapterConfig(rank=RANK, scale=SCALE, targets=case.targets), seed=SEED + 1)
    load_adapter_weights(folder, begun)
    _same_logits(logits(begun, tokens), expected, "begun from")
    return word


def check_generate(case: Case) -> str:
    """Answers to several prompts at once and in a chat are the most likely tokens by the whole model."""
    adapted = case.adapted()
    model, tokenizer = adapted.model, adapted.loaded.tokenizer
    model.eval()
    prompts = ["Repeat: red", "How many rows?", "SELECT name FROM users WHERE id is 7"]
    records = [{"prompt": prompt, "completion": "none"} for prompt in prompts]
    inputs = [prompt_tokens(record, tokenizer) for record in records]
    expected = [greedy_tokens(model, tokenizer, tokens) for tokens in inputs]
    found = greedy_answers(model, tokenizer, inputs, max_tokens=ANSWER_TOKENS, progress=lambda _: None)
    if found != expected:
        raise Failed(f"in a batch: the answers are {found}, not {expected}")
    scored = score_answers(
        partial(greedy_answers, model, tokenizer),
        tokenizer,
        [question(record, tokenizer) for record in records],
        {"exact_match": ExactMatch()},
        Solo(),
        max_tokens=ANSWER_TOKENS,
        progress=lambda *_: None,
    )
    if [answer.strip() for answer in scored.answers] != [tokenizer.decode(tokens).strip() for tokens in expected]:
        raise Failed(f"scored: the answers are {scored.answers}")
    for prompt, tokens in zip(prompts, expected, strict=True):
        said = "".join(Chat(ModelAnswers(model, tokenizer, Sampling(max_tokens=ANSWER_TOKENS)), tokenizer).say(prompt))
        in_pieces = tokenizer.detokenizer
        for token in tokens:
            in_pieces.add_token(token)
        in_pieces.finalize()
        if said != in_pieces.text:
            raise Failed(f"in a chat: the answer is {said!r}, not {in_pieces.text!r}")
    return "yes"


def greedy_tokens(model: nn.Module, tokenizer: Any, prompt: Sequence[int]) -> list[int]:
    """The most likely answer by whole sequences, without a cache."""
    tokens = list(prompt)
    for _ in range(ANSWER_TOKENS):
        best = int(mx.argmax(model(mx.array(tokens)[None])[0, -1]).item())
        if best in tokenizer.eos_token_ids:
            break
        tokens.append(best)
    return tokens[len(prompt) :]


def check_fuse(case: Case) -> str:
    """The fused model has the logits of the adapted one."""
    tokens = mx.array(case.rows[5].tokens)[None]
    adapted = case.adapted()
    expected = logits(adapted.model, tokens)
    if not fuse(adapted.loaded, dequantize=False):
        raise Failed("no layer was fused")
    _same_logits(logits(adapted.model, tokens), expected, "fused")
    return "yes"


CHECKS: dict[str, Callable[[Case], str]] = {
    "layers": check_layers,
    "experts": check_experts,
    "gradient": check_gradient,
    "packing": check_packing,
    "recompute": check_recompute,
    "stream": check_stream,
    "dropout": check_dropout,
    "dora": check_dora,
    "quantized": check_quantized,
    "validation": check_validation,
    "files": check_files,
    "generate": check_generate,
    "fuse": check_fuse,
}


def run(case: Case, names: Sequence[str] = tuple(CHECKS)) -> dict[str, str]:
    """The word of each check, or "FAILED: " and the reason; no check keeps another from being made."""
    words = {}
    for name in names:
        try:
            words[name] = CHECKS[name](case)
        except Failed as failed:
            words[name] = f"{FAILED}{failed}"
        except Exception as error:
            reason = " ".join(str(error).split())
            words[name] = f"{FAILED}{type(error).__name__}: {reason[:200]}"
    return words


def logits(model: nn.Module, tokens: mx.array) -> np.ndarray:
    """The logits (1, length, vocabulary) of ``tokens`` (1, length), without dropout."""
    model.eval()
    return np.array(model(tokens).astype(mx.float32))


def _same_logits(found: np.ndarray, expected: np.ndarray, what: str) -> None:
    finite = np.isfinite(expected)
    if found.shape != expected.shape or (np.isfinite(found) != finite).any():
        raise Failed(f"{what}: other logits are not finite")
    error = np.abs(found[finite] - expected[finite]).max() / np.abs(expected[finite]).max()
    if error > 1e-4:
        raise Failed(f"{what}: the logits differ by {error:.1e} of the largest")


def _difference(found: Any, expected: Any) -> str:
    missing = [name for name in expected if name not in found]
    more = [name for name in found if name not in expected]
    parts = []
    if missing:
        parts.append(f"{len(missing)} parameters are missing, {missing[0]} first")
    if more:
        parts.append(f"{len(more)} are not mlx-lm's, {more[0]} first")
    return "; ".join(parts) or "shapes differ"


def _added(parts: Iterator[Sums]) -> Sums:
    total, sums = 0.0, {}
    for part in parts:
        total += part.loss
        for name, value in part.gradient.items():
            sums[name] = sums.get(name, 0.0) + value.astype(np.float64)
    return Sums(total, sums)


def _quantized(model: nn.Module, config: dict[str, Any]) -> nn.Module:
    from mlx_lm.utils import quantize_model

    with contextlib.redirect_stdout(io.StringIO()):
        return quantize_model(model, config, 32, 4)[0]
