"""The Modelfile of Ollama for a GGUF file: its chat template in Ollama's form, found by rendering the model's own.

Ollama doesn't read the Jinja template in a GGUF file. Its templates are Go's (https://docs.ollama.com/modelfile).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_SYSTEM, _USER, _ASSISTANT, _AGAIN = "SYSTEMTEXT", "USERTEXT", "ASSISTANTTEXT", "AGAINTEXT"
Message = Mapping[str, str]


@dataclass(frozen=True)
class ChatForm:
    """What stands around the turns of a chat, where that is the same for every turn of a role.

    ``default`` begins a chat without a system prompt; ``answer`` is what the model continues.
    """

    default: str
    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    answer: str

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt for an answer to ``messages``."""
        text = "" if messages[0]["role"] == "system" else self.default
        for message in messages:
            before, after = getattr(self, message["role"])
            text += before + message["content"] + after
        return text + self.answer

    def ollama(self) -> str:
        """The same as a Go template."""
        system, user, assistant = (
            f"{before}{{{{ {name} }}}}{after}"
            for (before, after), name in (
                (self.system, ".System"),
                (self.user, ".Content"),
                (self.assistant, ".Content"),
            )
        )
        start = f"{{{{ if .System }}}}{system}{{{{ else }}}}{self.default}{{{{ end }}}}"
        turns = (
            f'{{{{ range .Messages }}}}{{{{ if eq .Role "user" }}}}{user}{{{{ else if eq .Role "assistant" }}}}'
            f"{assistant}{{{{ end }}}}{{{{ end }}}}"
        )
        return start + turns + self.answer


def chat_form(tokenizer: Any) -> ChatForm | None:
    """The form of a tokenizer's chats; None if it has no template, or one that treats turns of a role differently."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    beginning = _beginning(tokenizer)

    def rendered(*messages: Message, answer: bool = True) -> str:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer)
        return str(text).removeprefix(beginning)

    system, user = {"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER}
    assistant, again = {"role": "assistant", "content": _ASSISTANT}, {"role": "user", "content": _AGAIN}
    chat = [system, user, assistant, again]
    try:
        before_system, to_user, to_assistant, to_again, end = _parts(rendered(*chat))
        user_end = rendered(*chat, answer=False).partition(_AGAIN)[2]
        assistant_end = rendered(*chat[:3], answer=False).partition(_ASSISTANT)[2]
        before_user = _without_start(to_again, assistant_end)
        form = ChatForm(
            default=_without_end(rendered(user).partition(_USER)[0], before_user),
            system=(before_system, _without_end(to_user, before_user)),
            user=(before_user, user_end),
            assistant=(_without_start(to_assistant, user_end), assistant_end),
            answer=_without_start(end, user_end),
        )
        chats = ([user], [system, user], [user, assistant, again], [*chat, assistant, user])
        same = all(form.render(messages) == rendered(*messages) for messages in chats)
    except Exception:  # a template may refuse roles, by errors of its own
        return None
    writable = not any(mark in form.render(chat) + form.default for mark in ("{{", "}}", '"""'))
    return form if same and writable else None


def _beginning(tokenizer: Any) -> str:
    """The token that programs put before a prompt by themselves; empty if they don't."""
    bos = tokenizer.bos_token_id
    return str(tokenizer.bos_token) if bos is not None and tokenizer.encode("a")[:1] == [bos] else ""


def _parts(text: str) -> list[str]:
    parts = []
    for mark in (_SYSTEM, _USER, _ASSISTANT, _AGAIN):
        before, found, text = text.partition(mark)
        if not found:
            raise ValueError(mark)
        parts.append(before)
    return [*parts, text]


def _without_start(text: str, start: str) -> str:
    if not text.startswith(start):
        raise ValueError(text)
    return text[len(start) :]


def _without_end(text: str, end: str) -> str:
    if not text.endswith(end):
        raise ValueError(text)
    return text[: len(text) - len(end)]


def modelfile(gguf_name: str, tokenizer: Any) -> str:
    """The Modelfile for the GGUF file ``gguf_name`` beside it.

    Without a TEMPLATE, Ollama takes that of a model it knows, if the GGUF file's own is like it.
    """
    lines = [f"FROM ./{gguf_name}"]
    form = chat_form(tokenizer)
    if form is not None:
        lines.append(f'TEMPLATE """{form.ollama()}"""')
    lines += [f'PARAMETER stop "{tokenizer.decode([number])}"' for number in sorted(tokenizer.eos_token_ids)]
    return "\n".join(lines) + "\n"
