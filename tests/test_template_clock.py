"""Chat templates that show the time: one time for a whole run, on all nodes and after a resume."""

from __future__ import annotations

import json
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import chat_template_utils

from harness.runs import adapter_digests, train_to_end
from macft import evaluate
from macft.config.yaml import read
from macft.data.template_clock import fix_clock, shows_time
from macft.model.load import load_tokenizer
from macft.model.settings import ModelConfig

TIME = "2024-02-29T08:09:05"
CHAT = [{"role": "user", "content": "Which day is it?"}]
# Of public models, or harder than those: flags, a doubled percent sign, macros, white space that Jinja strips.
TEMPLATES = (
    "\n  {% if true %}X{% endif %}\n {{ strftime_now('%d %b %Y, %H:%M:%S %%d 100%% %-d %j %A %I%p %Y') }}",
    "{%- if strftime_now is defined %}{%- set day = strftime_now(\"%d %b %Y\") %}{%- else %}{%- set day = 'never' %}"
    "{%- endif %}\n{%- macro today() %}{{ strftime_now('%Y-%m-%d') }}{% endmacro %}{{ day }}|{{ today() }}",
    "  {% for message in messages %}\n{{ strftime_now('%H:%M') + message.content }}\n{% endfor %}",
)


@pytest.fixture(scope="module")
def clock_model(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """The tiny model with a template that shows the second."""
    folder = tmp_path_factory.mktemp("clock") / "model"
    shutil.copytree(tiny_model_folder, folder)
    template = folder / "chat_template.jinja"
    template.write_text("Now: {{ strftime_now('%H:%M:%S') }}\n" + template.read_text())
    return folder


def tokenizer_with(folder: Path, template: str | dict[str, str]) -> Any:
    tokenizer = load_tokenizer(ModelConfig(), folder)
    tokenizer._tokenizer.chat_template = template
    return tokenizer


class At(datetime):
    """A clock that stands at :data:`TIME`."""

    @classmethod
    def now(cls, _: Any = None) -> datetime:
        return datetime.fromisoformat(TIME)


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_renders_as_transformers_would_at_that_time(
    monkeypatch: pytest.MonkeyPatch, tiny_model_folder: Path, template: str
) -> None:
    tokenizer = tokenizer_with(tiny_model_folder, template)
    with monkeypatch.context() as patch:
        patch.setattr(chat_template_utils, "datetime", At)
        expected = tokenizer.apply_chat_template(CHAT, tokenize=False)
    fix_clock(tokenizer, TIME)
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == expected
    assert tokenizer.apply_chat_template(CHAT, tools=None, return_dict=False) == tokenizer.encode(
        expected, add_special_tokens=False
    )
    assert tokenizer.chat_template == template  # what is saved with a model


def test_a_template_for_tools_has_the_same_clock(tiny_model_folder: Path) -> None:
    templates = {"default": "no time", "tool_use": "{{ strftime_now('%Y') }} {{ tools[0].name }}"}
    tokenizer = tokenizer_with(tiny_model_folder, templates)
    assert shows_time(tokenizer)
    fix_clock(tokenizer, TIME)
    assert tokenizer.apply_chat_template(CHAT, tools=[{"name": "add"}], tokenize=False) == "2024 add"
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == "no time"


def test_without_a_time_it_is_that_of_the_call(tiny_model_folder: Path) -> None:
    tokenizer = tokenizer_with(tiny_model_folder, "{{ strftime_now('%H:%M:%S %f') }}")
    fix_clock(tokenizer, None)
    assert len({tokenizer.apply_chat_template(CHAT, tokenize=False) for _ in range(3)}) == 1
    assert not shows_time(load_tokenizer(ModelConfig(), tiny_model_folder))


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 2])
def test_a_resumed_run_sees_the_clock_of_its_start(
    tmp_path: Path, clock_model: Path, tiny_task: list[str], nodes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    task = [*tiny_task, f"model={clock_model}", "training.batch_size=4", "training.steps=4", "training.save_every=2"]
    local = ["training.eval_every=0", "topology=local", f"topology.nodes={nodes}", "optimizer.learning_rate=1e-2"]
    whole = train_to_end(*task, *local, folder=tmp_path / "whole")
    time = read(whole / "config.yaml").dataset.template_time
    assert time is not None
    assert f"dataset.template_time={time}" in (whole / "summary.md").read_text()
    digests = adapter_digests(whole)
    assert len(digests) == nodes
    assert len(set(digests)) == 1

    shutil.rmtree(whole / "checkpoints" / "step-00000004")
    train_to_end(f"+resume={whole}", folder=whole)
    assert read(whole / "config.yaml").dataset.template_time == time
    assert json.loads((whole / "summary.json").read_text())["adapter_sha256"] == digests[0]
    evaluate.main([str(whole), "--split", "train", "--rows", "1", "--metric", "none"])
    assert time in capsys.readouterr().out
