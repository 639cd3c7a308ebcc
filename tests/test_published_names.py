"""The names that a model's layers have in transformers, which adapters in PEFT's format need."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from harness.families import build, configuration, new_model
from helpers.computing import randomize_adapter
from macft import adapter as adapter_command
from macft.errors import ConfigError, ModelError
from macft.model.adapters.adapt import adapt
from macft.model.adapters.attach import read_adapter_config
from macft.model.adapters.files import save_adapter
from macft.model.adapters.peft import export_peft
from macft.model.adapters.published_names import published_names
from macft.model.adapters.settings import AdapterConfig


def published(family: str, folder: Path, renames: dict[str, str], *, transposed: tuple[str, ...] = ()) -> Path:
    """A checkpoint of the family under other names, as its publishers would have saved it with PyTorch."""
    build(family, folder)
    weights = dict(mx.load(str(folder / "model.safetensors")))
    for old, new in renames.items():
        weights = {name.replace(old, new): value for name, value in weights.items()}
    weights = {name: mx.contiguous(v.T) if name.endswith(transposed) else v for name, v in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    return folder


def trained_adapter(family: str, folder: Path, base: Path) -> list[str]:
    """Saves an adapter of the family's first block; returns the names of the layers."""
    model = new_model(configuration(family))
    adaptation = adapt(model, AdapterConfig(rank=4, layers=[0]), seed=0)
    randomize_adapter(model)
    save_adapter(folder, model, adaptation.mlx_lm_config, model_name=str(base))
    return sorted({name.rpartition(".")[0] for name, _ in tree_flatten(model.trainable_parameters())})


NEOX = {"model.h.": "gpt_neox.layers.", "model.": "gpt_neox."}


def test_names_that_mlx_lm_changed_are_changed_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = published("gpt_neox", tmp_path / "base", NEOX)
    modules = trained_adapter("gpt_neox", tmp_path / "ours", base)
    assert "model.h.0.attention.query_key_value" in modules
    names = published_names(base, modules)
    assert names["model.h.0.attention.query_key_value"] == "gpt_neox.layers.0.attention.query_key_value"
    words = ["export", "--adapter-path", str(tmp_path / "ours"), "--save-path", str(tmp_path / "peft")]
    adapter_command.main(words)
    tensors = mx.load(str(tmp_path / "peft" / "adapter_model.safetensors"))
    assert "base_model.model.gpt_neox.layers.0.mlp.dense_h_to_4h.lora_A.weight" in tensors
    assert len(tensors) == 2 * len(modules)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["layers_to_transform"] == [0]
    assert "not on this machine" not in capsys.readouterr().out


@pytest.mark.parametrize("family", ["llama", "mamba2", "starcoder2", "phi3"])
def test_names_that_mlx_lm_keeps_stay(family: str, tmp_path: Path) -> None:
    """Whether mlx-lm saved the checkpoint or its publishers did."""
    modules = trained_adapter(family, tmp_path / "ours", tmp_path / "base")
    same = {module: module for module in modules}
    assert published_names(build(family, tmp_path / "base"), modules) == same
    assert published_names(published(family, tmp_path / "base", {}), modules) == same


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("gpt2", r"--model: .* transformers may call model\.h\.0.* h\.0\..*name a folder with the model as it was pub"),
        ("gpt_neox", r"transformers may call model\.h\.0"),
        ("gemma3", r"--format: .* gemma3, a model with a text model inside, depends on its version; .*macft\.fuse"),
        ("falcon_h1", r"which may be others than the published model\.layers\.0"),
    ],
)
def test_names_that_cannot_be_concluded_are_refused(family: str, words: str, tmp_path: Path) -> None:
    modules = trained_adapter(family, tmp_path / "ours", tmp_path / "base")
    base = build(family, tmp_path / "base")
    with pytest.raises(ConfigError, match=words) as caught:
        export_peft(tmp_path / "ours", tmp_path / "peft", base_model="x", base=base)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "peft").exists()
    assert modules


def test_transposed_weights_and_models_without_a_head_are_refused(tmp_path: Path) -> None:
    """GPT-2's layers are Conv1D, whose weights are (in, out); its checkpoint begins at the blocks."""
    turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    base = published("gpt2", tmp_path / "base", {"model.": ""}, transposed=turned)
    modules = trained_adapter("gpt2", tmp_path / "ours", base)
    with pytest.raises(ConfigError, match=r"no layer of its own in transformers, or a transposed one"):
        published_names(base, modules)
    base = published("gpt_neox", tmp_path / "headless", {"model.": ""})
    with pytest.raises(
        ConfigError, match=r"calls model\.h\.0\.mlp\..* h\.0\.mlp.*, without the name of the model around"
    ):
        published_names(base, ["model.h.0.mlp.dense_h_to_4h"])


def test_a_base_that_is_not_here_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained_adapter("llama", tmp_path / "ours", tmp_path / "nowhere")
    words = ["export", "--adapter-path", str(tmp_path / "ours"), "--save-path", str(tmp_path / "peft")]
    adapter_command.main([*words, "--model", "nobody/nothing"])
    assert "the base model is not on this machine" in capsys.readouterr().out


def test_an_adapter_of_peft_says_how_to_convert_it(tmp_path: Path) -> None:
    """It has no adapters.safetensors, which is said of other folders only."""
    trained_adapter("llama", tmp_path / "ours", tmp_path / "base")
    export_peft(tmp_path / "ours", tmp_path / "peft", base_model="x")
    with pytest.raises(ModelError, match=r"is in PEFT's format; convert it first: python -m macft\.adapter import"):
        read_adapter_config(tmp_path / "peft")
