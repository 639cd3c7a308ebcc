"""The clock of chat templates: a template that shows the time sees one time during a whole run.

Templates read the clock by ``strftime_now``, a function that transformers gives them. Without a fixed clock a row has
other tokens on the next day, so a resumed run would train on other rows than before, and so would a node whose clock or
time zone differs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from functools import cache
from typing import Any

_FUNCTION = "strftime_now"
_DIRECTIVE = re.compile(r"%[-_0^#]?[A-Za-z]")
# Defined at the top of a template, the macro hides transformers' function. The line break at its end is removed with
# the tag, and the template begins at the start of a line, as it did before: its own white space stays what it was.
_MACRO = (
    "{%- macro " + _FUNCTION + "(format) -%}"
    "{%- for part in format.split('%%') -%}{{ '' if loop.first else '%' }}{{ part__REPLACED__ }}{%- endfor -%}"
    "{%- endmacro %}\n"
)


def now() -> str:
    """This machine's local time in seconds, as ISO 8601 without a time zone: a value of ``dataset.template_time``."""
    return datetime.now().isoformat(timespec="seconds")


def shows_time(tokenizer: Any) -> bool:
    """Whether a chat template of ``tokenizer`` reads the clock."""
    templates = getattr(tokenizer, "chat_template", None)
    texts = templates.values() if isinstance(templates, Mapping) else [templates]
    return any(isinstance(text, str) and _FUNCTION in text for text in texts)


def fix_clock(tokenizer: Any, time: str | None) -> list[str]:
    """Makes the chat templates of ``tokenizer``, mlx-lm's ``TokenizerWrapper``, see ``time`` from now on.

    Returns lines for the user: one where a template shows the time, otherwise none. The template that is saved with the
    tokenizer stays as it is.

    Args:
        time: ISO 8601, as :func:`now` returns it; None: the time of this call.
    """
    if not shows_time(tokenizer):
        return []
    time = time or now()
    moment = datetime.fromisoformat(time)
    render = tokenizer.apply_chat_template

    @cache
    def at_moment(template: str) -> str:
        return f"{_macro(template, moment)}{template}"

    def apply_chat_template(*arguments: Any, **options: Any) -> Any:
        chosen = tokenizer.get_chat_template(options.get("chat_template"), options.get("tools"))
        return render(*arguments, **{**options, "chat_template": at_moment(chosen)})

    tokenizer.apply_chat_template = apply_chat_template
    return [f"the model's chat template shows the time, here always that of dataset.template_time={time}"]


def _macro(template: str, moment: datetime) -> str:
    """``strftime_now`` at ``moment`` for the directives in ``template``; in Jinja, for a function can't be passed."""
    directives = sorted(set(_DIRECTIVE.findall(template)), key=len, reverse=True)
    calls = "".join(f".replace({item!r}, {moment.strftime(item)!r})" for item in directives)
    return _MACRO.replace("__REPLACED__", calls)
