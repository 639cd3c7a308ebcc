"""Uploads to the Hugging Face Hub, against a stand-in of its HTTP interface, and model cards."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import macft
from harness.runs import environment
from helpers.hub import Hub, local_hub
from helpers.names import NASTY
from macft.publishing.model_card import hub_id, model_card

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def run_folder(tiny_task: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of the tiny model."""
    few = ["training.batch_size=4", "training.steps=2", "training.eval_every=2", "report.console=false", "thermal=off"]
    folder = tmp_path_factory.mktemp("publishing") / NASTY
    return Path(macft.fit(macft.compose(overrides=[*tiny_task, *few]), folder=folder).folder)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with local_hub() as made:
        yield made


def macft_command(*words: str | Path, hub: Hub, token: str = "hf_secret") -> subprocess.CompletedProcess[str]:
    variables = environment() | {"HF_ENDPOINT": hub.address, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1"}
    variables.pop("HF_HUB_OFFLINE")
    if not token:
        variables.pop("HF_TOKEN")
        variables["HF_HOME"] = "/nowhere/at/all"
    command = [sys.executable, "-m", "macft", *map(str, words)]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=200)


@pytest.mark.slow
def test_an_adapter_is_pushed_with_a_card_and_nothing_of_this_machine(run_folder: Path, hub: Hub) -> None:
    done = macft_command("push", run_folder, "--repo", "me/tables", "--model", BASE, "--private", hub=hub)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{hub.address}/me/tables: adapter and model card\n"
    assert hub.tokens == {"Bearer hf_secret"}
    assert hub.private == {"me/tables": True}
    files = hub.repositories["me/tables"]
    assert set(files) - {".gitattributes"} == {"adapters.safetensors", "adapter_config.json", "README.md"}
    assert files["adapters.safetensors"] == (run_folder / "adapters" / "adapters.safetensors").read_bytes()
    settings = json.loads(files["adapter_config.json"])
    assert settings["model"] == BASE
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == BASE
    assert card.data.library_name == "mlx"
    assert "lora" in card.data.tags
    losses = json.loads((run_folder / "summary.json").read_text())["results"]
    assert f"| validation loss | {losses['valid_loss_before']:.3f} | {losses['valid_loss']:.3f} |" in card.text
    assert "local files" in card.text
    for private in (str(Path.home()), str(run_folder.parent), platform.node(), str(Path.cwd())):
        assert not [name for name, data in files.items() if private.encode() in data]


@pytest.mark.slow
def test_a_fused_model_is_uploaded_and_kept_where_the_hub_refuses(run_folder: Path, hub: Hub, tmp_path: Path) -> None:
    words = ["fuse", run_folder, "--upload-repo", "me/whole", "--save-path"]
    done = macft_command(*words, tmp_path / "fused", hub=hub)
    assert done.returncode == 0, done.stderr
    assert f"{hub.address}/me/whole: model and model card" in done.stdout
    files = hub.repositories["me/whole"]
    assert {"config.json", "tokenizer.json", "README.md", "model.safetensors"} <= set(files)
    assert files["model.safetensors"] == (tmp_path / "fused" / "model.safetensors").read_bytes()
    assert "mlx_lm.generate --model me/whole" in files["README.md"].decode()
    hub.refuses = 403
    done = macft_command(*words, tmp_path / "again", hub=hub)
    assert done.returncode == 1
    assert "refuses to write me/whole (status 403): the token must be one that may write there" in done.stderr
    assert f"hf upload me/whole {tmp_path / 'again'}" in done.stderr
    assert (tmp_path / "again" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "token", "message"),
    [
        (["--repo", "me/tables"], "hf_secret", "--model: "),
        (["--repo", "tables", "--model", BASE], "hf_secret", "--repo: 'tables' must be USER/NAME"),
        (["--repo", "me/a b", "--model", BASE], "hf_secret", "--repo: 'me/a b' can't name a repository: "),
        (["--repo", "me/tables", "--model", BASE], "", "--repo: you are not logged in; run `hf auth login`, or set"),
    ],
)
def test_what_cannot_be_uploaded_is_told_in_one_line(
    words: list[str], token: str, message: str, run_folder: Path, hub: Hub
) -> None:
    done = macft_command("push", run_folder, *words, hub=hub, token=token)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert done.stderr.startswith(f"error: {message}")
    assert not hub.repositories


@pytest.mark.slow
def test_a_hub_that_is_not_there_is_told_in_one_line(run_folder: Path) -> None:
    hub = Hub()
    hub.address = "http://127.0.0.1:9"
    done = macft_command("push", run_folder, "--repo", "me/tables", "--model", BASE, hub=hub)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
    assert done.stderr.startswith("error: http://127.0.0.1:9 can't be reached: ")


def test_names_of_this_machine_are_no_names_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_id("smollm2-135m-instruct") == BASE
    assert hub_id("mlx-community/Llama-3.2-1B-Instruct-4bit") == "mlx-community/Llama-3.2-1B-Instruct-4bit"
    for local in ("my/model", "/models/base", "./my/model", "~/model", "builtin:sql", "one", None):
        assert hub_id(local) is None


def test_a_card_names_datasets_of_the_hub_and_shows_the_metric() -> None:
    config = macft.compose("smoke", ["dataset=mlx-community/WikiSQL"])
    results = {"valid_loss_before": 1.728, "valid_loss": 0.115, "sql_execution_before": 0.042, "sql_execution": 0.771}
    summary = {"results": results, "train_rows": 2000, "valid_rows": 32, "adapter": "LoRA rank 8", "nodes": 2}
    card = ModelCard(model_card("me/a", base=BASE, is_adapter=True, config=config, summary=summary))
    assert card.data.datasets == ["mlx-community/WikiSQL"]
    assert "2,000 rows to train, 32 to validate" in card.text
    assert "| sql execution | 4.2% | 77.1% |" in card.text
    assert "| adapter | LoRA rank 8 |" in card.text
    assert f"mlx_lm.generate --model {BASE} --adapter-path adapter" in card.text
