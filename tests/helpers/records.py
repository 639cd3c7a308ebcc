"""Rows in mlx-lm's formats."""

from __future__ import annotations

from typing import Any

CHAT: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "4, of course — naïve but true."},
    ]
}
TOOL_CHAT = {
    **CHAT,
    "tools": [
        {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
    ],
}
LONG_CHAT = {
    "messages": [*CHAT["messages"], {"role": "user", "content": "And 3?"}, {"role": "assistant", "content": "5"}]
}
PAIR = {"prompt": "Translate: chat", "completion": "cat\n"}
TEXT = {"text": "Once upon a time.\n\n  Twice."}
