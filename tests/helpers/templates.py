"""Tokenizers with a chat template of the test's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mlx_lm.utils import load_tokenizer
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing


def tokenizer_with(folder: Path, bundled_model: Path, template: str | None, *, begin: str | None = None) -> Any:
    """The bundled model's tokenizer with another chat template, loaded from files in ``folder``; None: without one.

    Args:
        begin: A special token that the tokenizer puts before each text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "config.json"):
        shutil.copy(bundled_model / name, folder)
    settings = json.loads((bundled_model / "tokenizer_config.json").read_text())
    if begin is not None:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.post_processor = TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
        )
        tokenizer.save(str(folder / "tokenizer.json"))
        settings["bos_token"] = begin
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return load_tokenizer(folder)
