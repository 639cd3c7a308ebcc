"""Tokenizers with a chat template of the test's own."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing


def with_template(tokenizer: Any, template: str | None) -> Any:
    """mlx-lm's wrapper of the same tokenizer with another chat template; None: without one."""
    inner = copy.copy(tokenizer._tokenizer)
    inner.chat_template = template
    return TokenizerWrapper(inner)


def begin_texts(folder: Path, begin: str, template: str) -> None:
    """Changes the tokenizer in a model's ``folder``: it puts the special token ``begin`` before each text."""
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    path.write_text(tokenizer.to_str())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": begin}))
    (folder / "chat_template.jinja").write_text(template)
