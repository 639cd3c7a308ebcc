"""Tokenizers with a chat template of the test's own."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing


def with_template(tokenizer: Any, template: str | None) -> Any:
    """mlx-lm's wrapper of the same tokenizer with another chat template; None: without one."""
    inner = copy.copy(tokenizer._tokenizer)
    inner.chat_template = template
    return TokenizerWrapper(inner)


def beginning_with(folder: Path, bundled_model: Path, begin: str, template: str) -> Any:
    """A tokenizer, loaded from files in ``folder``, that puts the special token ``begin`` before each text."""
    for name in ("tokenizer.json", "config.json"):
        shutil.copy(bundled_model / name, folder)
    settings = json.loads((bundled_model / "tokenizer_config.json").read_text())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": begin}))
    (folder / "chat_template.jinja").write_text(template)
    return load_tokenizer(folder)
