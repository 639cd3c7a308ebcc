"""GGUF files, read by llama.cpp itself: the same tokens, logits and answers."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import httpx
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import macft.fuse
from helpers.models import FAMILIES, SMALL, make_from
from macft.errors import ConfigError
from macft.model.load import LoadedModel, load
from macft.model.settings import ModelConfig
from macft.publishing.gguf_model import check_gguf
from macft.publishing.modelfile import chat_form, modelfile

pytestmark = pytest.mark.slow

TEXTS = [
    "Hello world",
    "  leading spaces, trailing  ",
    "\n\n a\tb\r\nd  \n  \n x",
    "I've been 'told he's there, 'RE you sure? We'Ve a'lL",
    "3 33 333 3333 1234567890 3.14159 1,000,000",
    "٣٤٥ ①② Ⅷ ½ 🚀 😶‍🌫️ 👩‍👩‍👧‍👦 🇩🇪",
    "កាន់តែពិសេស 日本語 中文字符 한국어 العربية עברית हिन्दी ไทย",
    "нещо на Български ÄÖÜß éèêë",
    "def f(x):\n    return {k: v for k, v in x.items() if k != '__init__'}\n\t# comment\n",
    "------======= ''''```````\"\"\"\"......!!!!!!?????? https://x.org/?q=a%20b&c=d#e",
    "zero\u200bwidth\ufeffbom\u00a0nbsp e\u0301 \u3000wide\u2028line",
    "CamelCaseWord snake_case HTTPServer2 x1y2 $1,234.56",
    "<|user|>Hi<|end|>\n there <extra>too<|end|>",
]
TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|system|>Be kind.<|end|>\n{% endif %}"
    "<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# As in the tokenizer.json of Llama 3, Qwen 2.5, Mistral Nemo and GPT-4o.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]


def split_by(pattern: str) -> Any:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])


def byte_level(splitting: Any, *, ignore_merges: bool = False, begins: bool = False) -> Tokenizer:
    """A small BPE on bytes; ``begins``: it puts <|user|> before a text."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = splitting, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 2, trainer)
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken("<extra>", normalized=False)])
    if begins:
        template = [("<|user|>", tokenizer.token_to_id("<|user|>"))]
        tokenizer.post_processor = processors.TemplateProcessing(single="<|user|> $A", special_tokens=template)
    return tokenizer


def sentencepiece() -> Tokenizer:
    """A small BPE with bytes for what it doesn't know, as Llama 2 and Mistral have."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    learner.train_from_iterator(TEXTS[:4] * 2, trainers.BpeTrainer(vocab_size=150, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    first = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {text: number for number, text in enumerate([*first, *learned["vocab"]])}
    merges = [tuple(merge) for merge in learned["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", *SPECIAL])
    tokenizer.add_tokens([AddedToken("<extra>", normalized=False)])
    return tokenizer


def digits() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)])


# The model, and a tokenizer: each way of splitting once. The embeddings have more rows than there are tokens.
CASES: dict[str, tuple[dict[str, Any], Callable[[], Tokenizer]]] = {
    "llama": (FAMILIES["llama"], lambda: byte_level(digits())),
    "llama-untied": (FAMILIES["llama-untied"], sentencepiece),
    "llama-scaled": (FAMILIES["llama-scaled"], lambda: byte_level(split_by(LLAMA3), ignore_merges=True, begins=True)),
    "llama-biased": ({"model_type": "llama", "attention_bias": True}, lambda: byte_level(split_by(LLAMA3))),
    "qwen2": (FAMILIES["qwen2"], lambda: byte_level(split_by(QWEN2))),
    "qwen3": (FAMILIES["qwen3"], lambda: byte_level(split_by(QWEN2))),
    "smollm3": ({"num_hidden_layers": 5}, lambda: byte_level(split_by(TEKKEN), ignore_merges=True)),
    "mistral": (
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    ),
    "llama-wide": ({"model_type": "llama", "head_dim": 16}, lambda: byte_level(split_by(GPT4O))),
}


def save(folder: Path, family: str) -> Path:
    values, make_tokenizer = CASES[family]
    config = {**SMALL, "model_type": family, **values, "vocab_size": 480, "eos_token_id": 0}
    # mlx-lm computes Mistral by the code of Llama.
    model = make_from(config | {"model_type": "llama"} if family == "mistral" else config)
    folder.mkdir(parents=True)
    mx.save_safetensors(
        str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), metadata={"format": "mlx"}
    )
    (folder / "config.json").write_text(json.dumps(config))
    make_tokenizer().save(str(folder / "tokenizer.json"))
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|user|>", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def has_marks(text: str) -> bool:
    return any(unicodedata.category(letter).startswith("M") for letter in text)


@dataclass
class LlamaCpp:
    """A model in llama.cpp's server."""

    address: str

    def ask(self, path: str, **content: Any) -> Any:
        return httpx.post(self.address + path, json=content, timeout=60).raise_for_status().json()

    def tokens(self, text: str, *, special: bool = False) -> list[int]:
        found = self.ask("/tokenize", content=text, add_special=special, parse_special=True)["tokens"]
        return [int(token) for token in found]


@contextmanager
def llama_cpp(file: Path) -> Iterator[LlamaCpp]:
    xllamacpp = pytest.importorskip("xllamacpp")
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx, parameters.n_parallel, parameters.port = 256, 1, 0
    parameters.warmup, parameters.verbosity = False, 0
    server = xllamacpp.Server(parameters)
    try:
        yield LlamaCpp(server.listening_address)
    finally:
        del server


def exported(folder: Path, family: str, kind: str) -> tuple[LoadedModel, Path]:
    model = save(folder / "model", family)
    macft.fuse.main(["--model", str(model), "--save-path", str(folder / "fused"), "--gguf-type", kind])
    settings = ModelConfig(precision="float32", quantization="none")
    return load(settings, folder / "fused"), folder / "fused" / f"ggml-model-{kind}.gguf"


@pytest.mark.parametrize("family", CASES)
def test_llama_cpp_reads_and_answers_as_the_model_does(family: str, tmp_path: Path) -> None:
    loaded, file = exported(tmp_path, family, "f32")
    tokenizer = loaded.tokenizer
    with llama_cpp(file) as there:
        for text in TEXTS:
            if family.startswith("qwen"):  # normalises text, which llama.cpp doesn't
                text = unicodedata.normalize("NFC", text)
            if family in ("smollm3", "llama-wide") and has_marks(text):  # llama.cpp's pattern is without \p{M}
                continue
            assert there.tokens(text) == tokenizer.encode(text, add_special_tokens=False), text
        assert there.tokens("Hi", special=True) == tokenizer.encode("Hi")
        chat = [{"role": "user", "content": "Hello there"}]
        prompt = there.ask("/apply-template", messages=chat)["prompt"]
        rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert prompt == rendered.removeprefix(tokenizer.bos_token if family == "llama-scaled" else "")

        ids = [3, 17, 250, 99, 301, 42, 7, 12, 411, 8]
        answer = there.ask("/completion", prompt=ids, n_predict=1, n_probs=5, temperature=0, return_tokens=True)
        expected = nn.log_softmax(loaded.model(mx.array([ids]))[0, -1])
        found = answer["completion_probabilities"][0]["top_logprobs"]
        assert len(found) == 5
        for entry in found:
            assert entry["logprob"] == pytest.approx(expected[entry["id"]].item(), abs=5e-3)
        assert answer["tokens"] == [int(mx.argmax(expected))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("gguf") / "model", "llama")


def weights(file: Path) -> dict[str, Any]:
    return {tensor.name: (tensor.tensor_type.name, tensor) for tensor in gguf.GGUFReader(file).tensors}


@pytest.mark.parametrize(("kind", "tolerance"), [("f16", 5e-4), ("bf16", 4e-3), ("q8_0", 8e-3)])
def test_weights_have_the_type_asked_for(kind: str, tolerance: float, model: Path, tmp_path: Path) -> None:
    macft.fuse.main(["--model", str(model), "--save-path", str(tmp_path / "fused"), "--gguf-type", kind])
    found = weights(tmp_path / "fused" / f"ggml-model-{kind}.gguf")
    given = mx.load(str(model / "model.safetensors"))
    for theirs, ours in (
        ("token_embd", "model.embed_tokens"),
        ("blk.1.ffn_gate", "model.layers.1.mlp.gate_proj"),
        ("output_norm", "model.norm"),
    ):
        name, tensor = found[f"{theirs}.weight"]
        assert name == ("F32" if theirs == "output_norm" else kind.upper())
        expected = np.array(given[f"{ours}.weight"])
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_allclose(values, expected, atol=tolerance * np.abs(expected).max())
    # Rows of 48 don't divide into blocks of 32.
    assert found["blk.0.ffn_down.weight"][0] == ("F32" if kind == "q8_0" else kind.upper())


def test_a_quantised_base_is_written_with_the_values_it_stands_for(model: Path, tmp_path: Path) -> None:
    from mlx_lm.utils import load as mlx_lm_load
    from mlx_lm.utils import quantize_model
    from mlx_lm.utils import save as mlx_lm_save

    network, tokenizer, config = mlx_lm_load(str(model), return_config=True)
    # Rows of 48 have no groups of 32.
    network, config = quantize_model(network, config, 32, 4, quant_predicate=lambda _, each: each.weight.shape[1] == 32)
    layer = network.model.layers[0].mlp.up_proj
    expected = mx.dequantize(layer.weight, layer.scales, layer.biases, layer.group_size, layer.bits)
    mx.eval(expected)
    mlx_lm_save(tmp_path / "q", model, network, tokenizer, config)
    macft.fuse.main(["--model", str(tmp_path / "q"), "--save-path", str(tmp_path / "f"), "--gguf-type", "f32"])
    _, tensor = weights(tmp_path / "f" / "ggml-model-f32.gguf")["blk.0.ffn_up.weight"]
    np.testing.assert_allclose(tensor.data, np.array(expected), rtol=1e-6)


def test_values_that_float16_cannot_hold_are_refused(model: Path, tmp_path: Path) -> None:
    huge = tmp_path / "huge"
    huge.mkdir()
    for file in model.iterdir():
        (huge / file.name).symlink_to(file)
    (huge / "model.safetensors").unlink()
    tensors = mx.load(str(model / "model.safetensors"))
    tensors["model.layers.0.mlp.up_proj.weight"] = mx.full((48, 32), 1e6)
    mx.save_safetensors(str(huge / "model.safetensors"), tensors, metadata={"format": "mlx"})
    with pytest.raises(ConfigError, match=r"--gguf-type: model.layers.0.mlp.up_proj.weight .* choose bf16"):
        macft.fuse.main(["--model", str(huge), "--save-path", str(tmp_path / "fused"), "--export-gguf"])
    assert not (tmp_path / "fused").exists()


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("config.json", {"model_type": "gemma3_text"}, "macft writes llama, mistral, .* and this is gemma3_text"),
        ("config.json", {"rope_scaling": {"rope_type": "yarn"}}, "rope scaling of type yarn"),
        ("config.json", {"layer_types": ["sliding_attention"]}, "sliding window"),
        ("config.json", {"model_type": "smollm3", "no_rope_layer_interval": 2}, "every fourth layer"),
        ("tokenizer.json", {"model": {"type": "Unigram"}}, "of kind Unigram"),
        ("tokenizer.json", {"normalizer": {"type": "Lowercase"}}, "normalises text by Lowercase"),
        ("tokenizer.json", {"pre_tokenizer": {"type": "Whitespace"}}, "neither byte-level nor"),
        ("tokenizer.json", {"pre_tokenizer": json.loads(split_by("x+").__getstate__())}, "splits text into words in a"),
        ("tokenizer.json", {"added_tokens": [{"content": "<m>", "rstrip": True}]}, "'<m>' takes the spaces around"),
    ],
)
def test_what_llama_cpp_would_read_wrongly_is_refused_before_a_model_loads(
    file: str, changes: dict[str, Any], words: str, model: Path, tmp_path: Path
) -> None:
    for each in ("config.json", "tokenizer.json"):
        content = json.loads((model / each).read_text()) | (changes if each == file else {})
        (tmp_path / each).write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=words) as raised:
        check_gguf(tmp_path)
    assert str(raised.value).startswith("--export-gguf: ")
    assert "\n" not in str(raised.value)


def test_the_modelfile_has_the_chat_template_of_the_model(loaded: LoadedModel) -> None:
    form = chat_form(loaded.tokenizer)
    assert form is not None
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "?"},
    ]
    for messages in (chat, [{"role": "system", "content": "Be brief."}, *chat]):
        expected = loaded.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert form.render(messages) == expected
    text = modelfile("m.gguf", loaded.tokenizer)
    assert text.startswith('FROM ./m.gguf\nTEMPLATE """{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n')
    assert text.endswith('<|im_start|>assistant\n"""\nPARAMETER stop "<|im_end|>"\n')


def test_a_template_that_ollama_cannot_have_is_left_out(loaded: LoadedModel) -> None:
    class Other:
        chat_template, bos_token_id, eos_token_ids = "x", None, {2}
        decode = staticmethod(loaded.tokenizer.decode)

        @staticmethod
        def apply_chat_template(messages: list[dict[str, str]], **_: Any) -> str:
            return " ".join(f"{number}: {message['content']}" for number, message in enumerate(messages))

    assert chat_form(Other) is None
    assert modelfile("m.gguf", Other) == 'FROM ./m.gguf\nPARAMETER stop "<|im_end|>"\n'
