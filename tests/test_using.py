"""After a run: generate, evaluate, fuse and PEFT's format, as commands on one tiny run."""

from __future__ import annotations

import gc
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm import generate as mlx_lm_generate
from mlx_lm import load as mlx_lm_load

import macft
import macft.doctor
import macft.evaluate
import macft.fuse
import macft.generate
import macft.run.tuned_model
from harness.runs import Finished, environment, events, train, uneven_dataset
from harness.tiny_model import TINY_CONFIG, make_tiny_model
from helpers.models import random_adapter
from macft import adapter as adapter_command
from macft.errors import ConfigError, DataError, MacftError, ModelError
from macft.evaluation.chat import Chat, ModelAnswers, Sampling, add_stop_tokens
from macft.model.adapters.attach import attach, read_adapter_config
from macft.model.adapters.files import read_tensors
from macft.model.adapters.peft import export_peft, import_peft
from macft.model.adapters.settings import AdapterConfig
from macft.model.load import load_tokenizer
from macft.model.settings import ModelConfig

pytestmark = pytest.mark.slow


def call(module: str, *words: object, stdin: str = "", cwd: Path) -> Finished:
    """Runs ``python -m macft.<module>`` to its end."""
    done = subprocess.run(
        [sys.executable, "-m", f"macft.{module}", *map(str, words)],
        cwd=cwd,
        env=environment(),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """A finished run: rsLoRA, so that scale is neither mlx-lm's default nor alpha / rank."""
    folder = tmp_path_factory.mktemp("using")
    data = uneven_dataset(folder / "data")
    (folder / "own_words.py").write_text("def words(answer, expected, row):\n    return len(row['prompt'].split())\n")
    done = train(
        f"model={tiny_model_folder}",
        f"dataset={data}",
        "dataset.mask_prompt=true",
        "dataset.metric=[exact_match,rouge_l,perplexity,own_words.words]",
        "adapter=rslora",
        "adapter.rank=4",
        "adapter.alpha=16",
        "training.batch_size=4",
        "training.steps=4",
        "training.eval_every=4",
        "training.save_every=0",
        "training.metric_max_tokens=6",
        "optimizer.learning_rate=2e-3",
        f"hydra.run.dir={folder / 'run'}",
        cwd=folder,
    )
    assert done.status == 0, done.errors
    return folder / "run"


@pytest.fixture(scope="module")
def tuned(run: Path, tiny_model_folder: Path) -> tuple[nn.Module, Any]:
    """The tuned model as mlx-lm loads it, and its tokenizer."""
    model, tokenizer = mlx_lm_load(str(tiny_model_folder), adapter_path=str(run / "adapters"))[:2]
    return model, tokenizer


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's adapter in PEFT's format."""
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    done = call("adapter", "export", run, "--format", "peft", "--save-path", folder, cwd=run)
    assert done.status == 0, done.errors
    assert done.output.startswith(f"{folder}: LoRA rank 4, 14 modules, in PEFT's format")
    return folder


@pytest.fixture(scope="module")
def fused(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's adapter fused into its model, and as GGUF."""
    folder = tmp_path_factory.mktemp("fused") / "model"
    done = call("fuse", run, "--save-path", folder, "--export-gguf", cwd=run)
    assert done.status == 0, done.errors
    assert f"{folder}: 14 layers fused; float32" in done.output
    return folder


def mlx_lm_answer(model: nn.Module, tokenizer: Any, messages: list[dict[str, str]], max_tokens: int) -> str:
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return str(mlx_lm_generate(model, tokenizer, prompt, max_tokens=max_tokens))


def test_generate_answers_as_mlx_lm_does(run: Path, tuned: tuple[nn.Module, Any]) -> None:
    expected = mlx_lm_answer(*tuned, [{"role": "user", "content": "Repeat: red"}], 8)
    done = call("generate", run, "--prompt", "-", "--max-tokens", 8, stdin="Repeat: red", cwd=run)
    assert done.status == 0, done.errors
    assert done.output == expected + "\n"
    assert "answer 8 tokens" in done.errors


def test_a_chat_remembers_until_it_is_told_to_begin_anew(run: Path, tuned: tuple[nn.Module, Any]) -> None:
    first = [{"role": "user", "content": "seven lamps"}]
    answer = mlx_lm_answer(*tuned, first, 5)
    for question in (
        "and glass",
        "red",
        "what is north?",
        "1 2 3",
        "quiet",
        "cloud",
        "stone paper",
        "then",
        "why",
        "so",
    ):
        alone = [{"role": "user", "content": question}]
        remembered = mlx_lm_answer(*tuned, [*first, {"role": "assistant", "content": answer}, *alone], 5)
        if remembered != (forgotten := mlx_lm_answer(*tuned, alone, 5)):
            break
    assert remembered != forgotten  # a random model often answers the same to all
    stdin = f"seven lamps\n\n{question}\nr\n{question}\nq\nnever read\n"
    done = call("generate", run, "-m", 5, "--verbose", "False", stdin=stdin, cwd=run)
    assert done.status == 0, done.errors
    assert done.output == f"{answer}\n{remembered}\n{forgotten}\n"
    assert done.errors == ""


def test_an_answer_cut_short_leaves_the_conversation_whole(tuned: tuple[nn.Module, Any]) -> None:
    chat = Chat(ModelAnswers(*tuned, Sampling(max_tokens=12)), tuned[1], system_prompt="Be brief.")
    parts = chat.say("river stone")
    heard = next(parts) + next(parts) + next(parts)
    parts.close()
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "river stone"},
        {"role": "assistant", "content": heard},
        {"role": "user", "content": "quiet"},
    ]
    assert "".join(chat.say("quiet")) == mlx_lm_answer(*tuned, conversation, 12)


def test_sampling_is_repeatable_and_uses_its_options(
    tuned: tuple[nn.Module, Any], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(*words: str) -> str:
        macft.generate.main([str(run), "-p", "Repeat: red", "-m", "10", "--verbose", "False", *words])
        return capsys.readouterr().out

    greedy, hot = answer(), answer("--temp", "1.5", "--seed", "3")
    assert answer("--temp", "1.5", "--seed", "3") == hot
    assert answer("--temp", "1.5", "--seed", "4") != hot
    assert answer("--temp", "1.5", "--seed", "3", "--top-k", "1") == greedy != hot
    assert answer("--base") != greedy
    bare = tuned[1].encode("Repeat: red")
    assert answer("--ignore-chat-template") == mlx_lm_generate(*tuned, bare, max_tokens=10) + "\n"


def test_evaluate_compares_base_and_tuned(run: Path) -> None:
    file = run / "evaluation.json"
    done = call("evaluate", run, "--rows", 4, "--json", file, cwd=run)
    assert done.status == 0, done.errors
    report = json.loads(file.read_text())
    names = ["exact_match", "rouge_l", "perplexity", "own_words.words"]
    assert (report["split"], report["rows"], report["metrics"]) == ("test", 4, names)
    assert all(set(names) <= report[which].keys() for which in ("base", "tuned"))
    assert all(answer["tuned_scores"].keys() == set(names) - {"perplexity"} for answer in report["answers"])
    for which in ("base", "tuned"):
        assert report[which]["perplexity"] == pytest.approx(math.exp(report[which]["loss"]))
    assert report["tuned"]["loss"] < report["base"]["loss"]
    assert sum(report["agreement"].values()) == len(report["answers"]) == 4
    assert f"{report['tuned']['loss']:.3f}" in done.output
    for word in ("base", "tuned", "perplexity", "exact match", "4 test rows"):
        assert word in done.output


def test_a_run_measures_what_evaluate_measures(run: Path) -> None:
    """From another folder than that of the user's own metric, which the run has kept."""
    scored = {(event["name"], event["when"]): event["value"] for event in events(run, "metric_scored")}
    evaluation = macft.open_run(run).evaluate()
    for result, when in ((evaluation.base, "before"), (evaluation.tuned, "after")):
        numbers = result.numbers()
        assert len(numbers) == 5
        for name in numbers.keys() - {"loss"}:
            assert scored[name, when] == pytest.approx(numbers[name], rel=1e-4), (name, when)
    assert scored["own_words.words", "after"] == scored["own_words.words", "before"] > 1
    assert scored["perplexity", "after"] == pytest.approx(math.exp(evaluation.tuned.loss), rel=1e-4)
    summary = (run / "summary.md").read_text()
    assert "| ROUGE-L |" in summary
    assert "| question | expected | before | after |" in summary
    assert len(json.loads((run / "summary.json").read_text())["samples"]) == 3


def test_evaluate_finds_the_losses_the_run_found(run: Path, tmp_path: Path) -> None:
    validated = [event["loss"] for event in events(run, "evaluated")]
    macft.evaluate.main([str(run), "--split", "valid", "--metric", "none", "--json", str(tmp_path / "e.json")])
    report = json.loads((tmp_path / "e.json").read_text())
    assert [report["base"]["loss"], report["tuned"]["loss"]] == pytest.approx([validated[0], validated[-1]], rel=1e-5)
    assert report["answers"] == []


def test_evaluate_takes_another_dataset_and_an_adapter_alone(run: Path, tmp_path: Path) -> None:
    other = uneven_dataset(tmp_path / "other") / "test.jsonl"
    words = ["--adapter-path", str(run / "adapters"), "--dataset", str(other), "--json", str(tmp_path / "e.json")]
    macft.evaluate.main(words)
    masked = [*words, "--mask-prompt"]
    whole = json.loads((tmp_path / "e.json").read_text())
    macft.evaluate.main(masked)
    answers_only = json.loads((tmp_path / "e.json").read_text())
    assert whole["rows"] == answers_only["rows"] == 6
    assert answers_only["target_tokens"] < whole["target_tokens"]


def test_a_fused_model_answers_like_the_tuned_one(fused: Path, run: Path, tuned: tuple[nn.Module, Any]) -> None:
    model, tokenizer = mlx_lm_load(str(fused))[:2]
    assert not any("lora" in name for name, _ in tree_flatten(model.parameters()))
    tokens = mx.array([tokenizer.encode("Repeat: seven red lamps")])
    np.testing.assert_allclose(np.array(model(tokens)), np.array(tuned[0](tokens)), rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="exists already; choose another, or remove it"):
        macft.fuse.main([str(run), "--save-path", str(fused)])


def test_a_model_larger_than_the_memory_is_fused(
    bundled_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are read, fused and written one file after the other, for GGUF one tensor after the other."""
    base = make_tiny_model(tmp_path / "base", bundled_model, TINY_CONFIG | {"num_hidden_layers": 40})
    random_adapter(tmp_path / "adapter", base, AdapterConfig(num_layers=2, rank=4))
    monkeypatch.setattr("mlx_lm.utils.make_shards", lambda weights: [{name: weights[name]} for name in list(weights)])
    words = ["--model", str(base), "--adapter-path", str(tmp_path / "adapter"), "--save-path", str(tmp_path / "fused")]
    gc.collect()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    macft.fuse.main([*words, "--gguf-type", "f32"])
    peak = mx.get_peak_memory() - before
    assert peak < (base / "model.safetensors").stat().st_size / 2
    fused = {}
    for file in (tmp_path / "fused").glob("model*.safetensors"):
        fused |= read_tensors(file)
    name = "model.layers.39.mlp.down_proj"
    assert fused.keys() == read_tensors(base / "model.safetensors").keys()
    adapter = read_tensors(tmp_path / "adapter" / "adapters.safetensors")
    change = AdapterConfig(rank=4).effective_scale() * (adapter[f"{name}.lora_a"] @ adapter[f"{name}.lora_b"]).T
    expected = read_tensors(base / "model.safetensors")[f"{name}.weight"] + change
    assert mx.allclose(fused[f"{name}.weight"], expected, atol=1e-6)
    written = mx.load(str(tmp_path / "fused" / "ggml-model-f32.gguf"))
    assert mx.array_equal(written["blk.39.ffn_down.weight"], fused[f"{name}.weight"])


def test_the_gguf_file_holds_the_fused_weights(fused: Path) -> None:
    weights, metadata = mx.load(str(fused / "ggml-model-f16.gguf"), return_metadata=True)
    assert metadata["general.architecture"] == "llama"
    ours = read_tensors(fused / "model.safetensors")
    theirs, expected = weights["blk.1.ffn_down.weight"], ours["model.layers.1.mlp.down_proj.weight"]
    np.testing.assert_allclose(np.array(theirs), np.array(expected), rtol=1e-3, atol=1e-5)


def test_fusing_a_quantised_base_keeps_its_bits_or_drops_them(
    tmp_path: Path, tiny_model_folder: Path, run: Path
) -> None:
    from mlx_lm.utils import quantize_model, save

    model, tokenizer, config = mlx_lm_load(str(tiny_model_folder), return_config=True)
    model, config = quantize_model(model, config, 32, 8)
    save(tmp_path / "base", tiny_model_folder, model, tokenizer, config)
    words = ["--model", str(tmp_path / "base"), "--adapter-path", str(run / "adapters"), "--save-path"]
    macft.fuse.main([*words, str(tmp_path / "kept")])
    macft.fuse.main([*words, str(tmp_path / "dropped"), "--dequantize"])
    kept, dropped = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("kept", "dropped"))
    assert kept["quantization"]["bits"] == 8
    assert "quantization" not in dropped
    tokens = mx.array([tokenizer.encode("Repeat: seven red lamps")])
    quantised, exact = (mlx_lm_load(str(tmp_path / name))[0](tokens) for name in ("kept", "dropped"))
    model = mlx_lm_load(str(tmp_path / "base"), adapter_path=str(run / "adapters"))[0]
    np.testing.assert_allclose(np.array(exact), np.array(model(tokens)), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(np.array(quantised), np.array(exact), atol=0.2)


def test_peft_files_are_what_the_format_says(exported: Path, fused: Path, tiny_model_folder: Path) -> None:
    config = json.loads((exported / "adapter_config.json").read_text())
    wanted = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "use_rslora": True, "use_dora": False, "bias": "none"}
    assert wanted.items() <= config.items()
    assert set(config["target_modules"]) == set("q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split())
    assert config["layers_to_transform"] == [0, 1]
    assert config["base_model_name_or_path"] == str(tiny_model_folder)
    tensors = {name: np.array(value) for name, value in read_tensors(exported / "adapter_model.safetensors").items()}
    base = read_tensors(tiny_model_folder / "model.safetensors")
    tuned_weights = read_tensors(fused / "model.safetensors")
    scale = config["lora_alpha"] / math.sqrt(config["r"])
    assert len(tensors) == 2 * 14
    for name in (name for name in base if name.endswith("_proj.weight")):
        prefix = "base_model.model." + name.removesuffix("weight")
        change = scale * tensors[prefix + "lora_B.weight"] @ tensors[prefix + "lora_A.weight"]
        assert np.abs(change).max() > 1e-4
        np.testing.assert_allclose(np.array(base[name]) + change, np.array(tuned_weights[name]), atol=1e-5)


def test_an_exported_adapter_comes_back_and_answers_the_same(
    exported: Path, run: Path, tmp_path: Path, tuned: tuple[nn.Module, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    done = call("adapter", "import", exported, "--save-path", tmp_path / "back", cwd=tmp_path)
    assert done.status == 0, done.errors
    before, after = (
        read_tensors(run / "adapters/adapters.safetensors"),
        read_tensors(tmp_path / "back/adapters.safetensors"),
    )
    assert before.keys() == after.keys()
    assert all(np.array_equal(np.array(before[name]), np.array(after[name])) for name in before)
    # Only the adapter is named: the model's name came through both formats.
    expected = mlx_lm_answer(*tuned, [{"role": "user", "content": "Repeat: red"}], 6)
    macft.generate.main(["--adapter-path", str(tmp_path / "back"), "-p", "Repeat: red", "-m", "6"])
    assert capsys.readouterr().out == expected + "\n"


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_some_layers_and_dora_survive_both_ways(tmp_path: Path, tiny_model_folder: Path, kind: str) -> None:
    config = AdapterConfig(type=kind, rank=3, scale=2.5, layers=[0], targets=["q_proj", "down_proj"])
    model = random_adapter(tmp_path / "ours", tiny_model_folder, config)
    export_peft(tmp_path / "ours", tmp_path / "peft", base_model="tiny")
    written = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert (written["lora_alpha"], written["layers_to_transform"]) == (7.5, [0])
    assert sorted(written["target_modules"]) == ["down_proj", "q_proj"]
    import_peft(tmp_path / "peft", tmp_path / "back")
    other = mlx_lm_load(str(tiny_model_folder))[0]
    attach(other, tmp_path / "back")
    tokens = mx.array([[5, 60, 700, 8]])
    np.testing.assert_allclose(np.array(other(tokens)), np.array(model(tokens)), rtol=1e-5, atol=1e-5)


# PEFT is slow to import, and so is every process of a Python that has PyTorch: it may be a Python of its own.
PEFT_PYTHON = os.environ.get("PEFT_PYTHON", sys.executable)
PEFT = """
import sys
import numpy, peft, torch, transformers
model, tokens, *folders = sys.argv[1:]
tokens = torch.tensor([[int(token) for token in tokens.split()]])
for folder in folders:
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        plain = base(tokens).logits.numpy()
        tuned = peft.PeftModel.from_pretrained(base, f"{folder}/peft").eval()
        numpy.savez(f"{folder}/logits.npz", plain=plain, tuned=tuned(tokens).logits.numpy())
    tuned.save_pretrained(f"{folder}/saved")
"""
PEFT_KINDS = {
    "lora": AdapterConfig(rank=4, scale=2.0),
    "rslora": AdapterConfig(rank=4, scale=2.0, alpha=8.0, rslora=True),
    "dora": AdapterConfig(type="dora", rank=4, scale=2.0),
}
PEFT_TOKENS = [5, 60, 700, 8, 90, 1000]


@pytest.fixture(scope="module")
def in_peft(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """A folder with one for each kind: our adapter, the export, its logits in PEFT, and what PEFT saves of it."""
    folder = tmp_path_factory.mktemp("in-peft")
    for kind, config in PEFT_KINDS.items():
        random_adapter(folder / kind / "ours", tiny_model_folder, config)
        model, alpha, rslora = str(tiny_model_folder), config.alpha, config.rslora
        export_peft(folder / kind / "ours", folder / kind / "peft", base_model=model, alpha=alpha, rslora=rslora)
    words = [tiny_model_folder, " ".join(map(str, PEFT_TOKENS)), *(folder / kind for kind in PEFT_KINDS)]
    done = subprocess.run(
        [PEFT_PYTHON, "-c", PEFT, *map(str, words)], env=environment(), capture_output=True, text=True, check=False
    )
    if "ModuleNotFoundError" in done.stderr:
        pytest.skip(f"{done.stderr.splitlines()[-1]} in {PEFT_PYTHON}; PEFT_PYTHON may name another")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("kind", PEFT_KINDS)
def test_peft_itself_computes_the_same(in_peft: Path, tmp_path: Path, tiny_model_folder: Path, kind: str) -> None:
    def answer(adapter: Path) -> np.ndarray:
        model = mlx_lm_load(str(tiny_model_folder))[0]
        attach(model, adapter)
        return np.array(model(mx.array([PEFT_TOKENS])))

    logits, ours = np.load(in_peft / kind / "logits.npz"), answer(in_peft / kind / "ours")
    assert np.abs(logits["tuned"] - logits["plain"]).max() > 0.1
    np.testing.assert_allclose(logits["tuned"], ours, rtol=1e-3, atol=1e-3)
    # And what PEFT saves comes back.
    import_peft(in_peft / kind / "saved", tmp_path / "back")
    np.testing.assert_allclose(answer(tmp_path / "back"), ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type LOHA has no equivalent"),
        ({"modules_to_save": ["lm_head"]}, 'modules_to_save=["lm_head"] has no equivalent'),
        ({"rank_pattern": {"q_proj": 2}}, 'rank_pattern={"q_proj": 2} has no equivalent'),
        ({"bias": "all"}, "bias=all has no equivalent"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa changed the base model"),
        ({"r": 7}, "is not of rank 7"),
        ({"r": "8"}, "r must be a whole number"),
        ({"use_dora": True}, "must have lora_a, lora_b, m, not lora_a, lora_b"),
    ],
)
def test_what_has_no_equivalent_is_refused(
    exported: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    source = tmp_path / "peft"
    source.mkdir()
    config = json.loads((exported / "adapter_config.json").read_text()) | change
    (source / "adapter_config.json").write_text(json.dumps(config))
    (source / "adapter_model.safetensors").symlink_to(exported / "adapter_model.safetensors")
    with pytest.raises((ConfigError, ModelError)) as refused:
        adapter_command.main(["import", str(source), "--save-path", str(tmp_path / "out")])
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_pickled_and_torn_adapters_are_refused(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text((exported / "adapter_config.json").read_text())
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match="is a pickle, which macft doesn't read"):
        import_peft(tmp_path, tmp_path / "out")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ModelError, match="can't be read"):
        import_peft(tmp_path, tmp_path / "out")


def test_full_fine_tuning_has_no_peft_form(tmp_path: Path, tiny_model_folder: Path) -> None:
    random_adapter(tmp_path / "ours", tiny_model_folder, AdapterConfig(type="full", num_layers=1))
    words = ["export", "--adapter-path", str(tmp_path / "ours"), "--save-path", str(tmp_path / "out")]
    with pytest.raises(ConfigError, match="no equivalent of full fine-tuning; use python"):
        adapter_command.main(words)


@pytest.mark.parametrize(
    ("main", "words", "error", "message"),
    [
        (macft.generate.main, [], ConfigError, "RUN_FOLDER: name a run's folder"),
        (macft.generate.main, ["/nowhere"], ConfigError, "RUN_FOLDER: /nowhere does not exist"),
        (macft.generate.main, ["{run}/adapters"], ConfigError, "name it by --adapter-path"),
        (macft.generate.main, ["{run}", "-p", "x", "--top-p", "7"], ConfigError, "--top-p: 7.0 is not in [0, 1]"),
        (macft.generate.main, ["{run}", "-p", "x", "--seed", "-1"], ConfigError, "--seed: -1 must be from 0"),
        (macft.generate.main, ["{run}", "--temp", "hot"], ConfigError, "--temp: invalid float value: 'hot'"),
        (macft.generate.main, ["--adapter-path", "{run}"], ModelError, "it has no adapter_config.json"),
        (macft.evaluate.main, ["{run}", "--rows", "0"], ConfigError, "--rows: 0 must be 1 or more"),
        (macft.evaluate.main, ["{run}", "--json", "/no/e.json"], ConfigError, "--json: the folder /no does not exist"),
        (macft.evaluate.main, ["{run}", "--json", "/"], ConfigError, "--json: / is a folder; name a file"),
        (macft.doctor.main, ["--report", "/"], ConfigError, "--report: / is a folder; name a file"),
        (macft.evaluate.main, ["{run}", "--dataset", "/no.jsonl"], DataError, "/no.jsonl does not exist"),
        (macft.evaluate.main, ["--model", "x"], ConfigError, "nothing to compare"),
        (macft.fuse.main, ["{run}", "--gguf-path", "../x"], ConfigError, "--gguf-path: ../x must be a file name"),
        (adapter_command.main, ["export", "{run}"], ConfigError, "required: --save-path"),
        (adapter_command.main, ["import", "{run}", "--save-path", "{run}/x"], ModelError, "not a PEFT adapter"),
    ],
)
def test_a_mistake_is_one_line_before_a_model_loads(
    run: Path, main: Callable[[list[str]], None], words: list[str], error: type[MacftError], message: str
) -> None:
    with pytest.raises(error) as raised:
        main([word.format(run=run) for word in words])
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"num_layers": None}, "num_layers"),
        ({"lora_parameters": {"rank": 8, "scale": "20"}}, "lora_parameters.scale"),
        ({"lora_parameters": None}, "lora_parameters.rank"),
    ],
)
def test_settings_of_an_adapter_that_are_no_numbers_are_named(
    tmp_path: Path, change: dict[str, Any], name: str
) -> None:
    settings = {"num_layers": 2, "lora_parameters": {"rank": 8, "scale": 20.0}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | change))
    (tmp_path / "adapters.safetensors").touch()
    with pytest.raises(ModelError, match=rf"adapter_config\.json: {re.escape(name)} must be a number"):
        read_adapter_config(tmp_path)


def test_an_adapter_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    settings = {"num_layers": 2, "lora_parameters": {"rank": 8, "scale": 20.0}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), {"a": mx.ones(2), "b": mx.array([1.0, mx.nan])})
    with pytest.raises(ModelError, match=r"b has values that are not finite; its training diverged, or it is damaged$"):
        attach(nn.Linear(2, 2), tmp_path)


def test_an_adapter_of_another_kind_is_named(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"fine_tune_type": "loha"}')
    (tmp_path / "adapters.safetensors").touch()
    with pytest.raises(ModelError, match=r"fine_tune_type must be one of lora, dora, full, not 'loha'$"):
        read_adapter_config(tmp_path)


def test_a_stop_token_that_the_model_lacks_is_told(tiny_model_folder: Path) -> None:
    tokenizer = load_tokenizer(ModelConfig(), tiny_model_folder)
    add_stop_tokens(tokenizer, ["<|im_start|>", "7"])
    assert {7, tokenizer.convert_tokens_to_ids("<|im_start|>")} <= tokenizer.eos_token_ids
    with pytest.raises(ConfigError, match=r"--extra-eos-token: 'nope!' is no token of this model; give one such as"):
        add_stop_tokens(tokenizer, ["nope!"])


def test_an_unfinished_run_says_how_to_end_it(run: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    with pytest.raises(ConfigError, match=r"has no adapter yet.*train \+resume="):
        macft.generate.main([str(tmp_path), "-p", "x"])


@pytest.mark.parametrize("module", ["generate", "evaluate", "fuse", "adapter"])
def test_help_needs_no_model(module: str) -> None:
    code = (
        f"import sys, runpy; sys.argv[1:] = ['--help']\n"
        f"try: runpy.run_module('macft.{module}', run_name='__main__')\n"
        f"except SystemExit as end: print(end.code, sorted({{'mlx', 'mlx_lm', 'transformers'}} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=180, check=True
    )
    assert f"usage: python -m macft.{module}" in done.stdout
    assert done.stdout.endswith("0 []\n")
