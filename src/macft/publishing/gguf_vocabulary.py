"""A Hugging Face ``tokenizer.json`` as the vocabulary of a GGUF file.

llama.cpp has its own tokenizers: byte-level BPE (``gpt2`` in a GGUF file), whose ways of splitting text into words have
names, and SentencePiece's BPE (``llama``). Here the steps of ``tokenizer.json`` are matched with those in llama.cpp's
``src/llama-vocab.cpp``; a tokenizer with other steps is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from macft.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from gguf import GGUFWriter

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_CASED_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _cased(ending: str, numbers: str) -> str:
    """A pattern that ends a word where lower case turns into upper case."""
    return f"{_LEAD}{_UPPER}*{_LOWER}+{ending}|{_LEAD}{_UPPER}+{_LOWER}*{ending}|{numbers}{_CASED_TAIL}"


# Patterns of a Split step, by the name of llama.cpp's pre-tokenizer; with what ``ignore_merges`` is there.
_SPLITS = {
    (rf"{_CONTRACTIONS}|{_LEAD}\p{{L}}+|\p{{N}}{{1,3}}{_TAIL}", True): "llama-bpe",
    (rf"{_CONTRACTIONS}|{_LEAD}\p{{L}}+|\p{{N}}{{1,3}}{_TAIL}", False): "smaug-bpe",
    (rf"{_CONTRACTIONS}|{_LEAD}\p{{L}}+|\p{{N}}{_TAIL}", False): "qwen2",
    (
        rf"{_CONTRACTIONS}|{_LEAD}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
        False,
    ): "qwen35",
    (_cased("", r"\p{N}"), True): "tekken",
    (_cased(_CONTRACTIONS + "?", r"\p{N}{1,3}"), False): "gpt-4o",
}
_SPACE = "▁"


@dataclass(frozen=True)
class Scheme:
    """How llama.cpp reads text with this vocabulary.

    ``model`` is ``gpt2`` or ``llama``; ``splitting`` the name of the pre-tokenizer (of ``gpt2``); ``space_first``
    whether a space is put before a text (by ``llama``).
    """

    model: str
    splitting: str = "default"
    space_first: bool = False


def read_tokenizer(folder: Path) -> dict[str, Any]:
    """The content of ``tokenizer.json``.

    Raises:
        ModelError: There is none, or it can't be read.
    """
    path = folder / "tokenizer.json"
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} can't be read: {error}") from error
    return content


def scheme(tokenizer: Mapping[str, Any]) -> Scheme:
    """How llama.cpp reads text with the ``tokenizer``, the content of a ``tokenizer.json``.

    Raises:
        ConfigError: It has no such tokenizer.
    """
    model = tokenizer["model"]
    if model.get("type", "BPE") != "BPE":
        raise _refused(f"of kind {model['type']}, and llama.cpp has BPE")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise _refused(f"a BPE with {key}")
    for token in tokenizer.get("added_tokens") or ():
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            raise _refused(f"one whose token {token['content']!r} takes the spaces around it")
    return _sentencepiece(tokenizer) if model.get("byte_fallback") else _byte_level(tokenizer)


def _refused(what: str) -> ConfigError:
    return ConfigError(
        f"--export-gguf: this model's tokenizer is {what}; "
        "convert the fused folder with llama.cpp's convert_hf_to_gguf.py"
    )


def _steps(part: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, a sequence or a single one."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for entry in part[inner] for step in _steps(entry, inner)]
    return [part]


def _byte_level(tokenizer: Mapping[str, Any]) -> Scheme:
    normalizers = [step["type"] for step in _steps(tokenizer.get("normalizer"), "normalizers")]
    # llama.cpp doesn't normalise. Text is in NFC nearly always.
    if set(normalizers) - {"NFC"}:
        raise _refused(f"one that normalises text by {', '.join(normalizers)}")
    steps = _steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        raise _refused("neither byte-level nor SentencePiece's BPE")
    ignore_merges = bool(tokenizer["model"].get("ignore_merges"))
    name = None
    if steps[-1].get("use_regex", True):
        kinds = [step["type"] if step.get("individual_digits", True) else "" for step in steps[:-1]]
        name = {(): "gpt-2", ("Digits",): "smollm"}.get(tuple(kinds)) if not ignore_merges else None
    elif len(steps) == 2 and steps[0]["type"] == "Split":
        name = _SPLITS.get((_pattern(steps[0]), ignore_merges))
    if name is None:
        raise _refused("one that splits text into words in a way macft doesn't know in llama.cpp")
    return Scheme("gpt2", splitting=name)


def _pattern(step: Mapping[str, Any]) -> str:
    """The pattern of the words that a Split step leaves; empty where it isn't given so."""
    kept = (step.get("behavior"), bool(step.get("invert")))
    return str(step["pattern"].get("Regex", "")) if kept in {("Isolated", False), ("Removed", True)} else ""


def _sentencepiece(tokenizer: Mapping[str, Any]) -> Scheme:
    normalizers = _steps(tokenizer.get("normalizer"), "normalizers")
    steps = _steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
    space_first = False
    for step in normalizers:
        if step["type"] == "Prepend" and step.get("prepend") == _SPACE:
            space_first = True
        elif step["type"] != "Replace" or step.get("content") != _SPACE or step["pattern"].get("String") != " ":
            raise _refused(f"one that normalises text by {step['type']}")
    for step in steps:
        if step["type"] == "Metaspace" and step.get("replacement", _SPACE) == _SPACE and not step.get("split"):
            # "first": before a text that no special token begins. A chat begins with one, and llama.cpp would put a
            # space behind every special token.
            space_first = step.get("prepend_scheme", "always") == "always"
        elif step["type"] != "Split" or step["pattern"].get("String") != " ":  # Gemma's, which divides nothing
            raise _refused(f"one that splits text by {step['type']}")
    if not (normalizers or steps):
        raise _refused("one that keeps spaces as they are")
    return Scheme("llama", space_first=space_first)


def add_vocabulary(writer: GGUFWriter, folder: Path, *, rows: int) -> None:
    """Adds the vocabulary, special tokens and chat template of the model in ``folder`` to ``writer``.

    Args:
        writer: Of the GGUF file.
        folder: A saved model.
        rows: Rows of the model's embedding. llama.cpp wants as many tokens; ids without one are filled.

    Raises:
        ConfigError: llama.cpp has no such tokenizer, or the embedding has too few rows.
        ModelError: ``tokenizer.json`` can't be read.
    """
    import gguf

    tokenizer = read_tokenizer(folder)
    found = scheme(tokenizer)
    texts, kinds = _tokens(tokenizer, found, rows)
    writer.add_tokenizer_model(found.model)
    writer.add_tokenizer_pre(found.splitting)
    writer.add_token_list(texts)
    if found.model == "llama":
        writer.add_token_scores(_scores(tokenizer, texts))
        writer.add_add_space_prefix(found.space_first)
    writer.add_token_types(kinds)
    special = gguf.SpecialVocab(folder, load_merges=found.model == "gpt2", n_vocab=rows)
    # llama.cpp has defaults that depend on the splitting.
    special.add_special_token.setdefault("bos", False)
    special.add_special_token.setdefault("eos", False)
    special.add_to_gguf(writer, quiet=True)


def _tokens(tokenizer: Mapping[str, Any], found: Scheme, rows: int) -> tuple[list[str], list[int]]:
    """The text and the kind of each token, by its id."""
    from gguf import TokenType

    texts = {number: text for text, number in tokenizer["model"]["vocab"].items()}
    kinds = dict.fromkeys(texts, TokenType.NORMAL)
    if found.model == "llama":
        for number, text in texts.items():
            if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
                kinds[number] = TokenType.BYTE
            elif text == tokenizer["model"].get("unk_token"):
                kinds[number] = TokenType.UNKNOWN
    for token in tokenizer.get("added_tokens") or ():
        number, text = token["id"], token["content"]
        texts[number] = text.replace(_SPACE, " ") if found.model == "llama" and not token["special"] else text
        if kinds.get(number) is not TokenType.UNKNOWN:
            kinds[number] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    if texts and max(texts) >= rows:
        raise ConfigError(f"--export-gguf: the tokenizer has a token {max(texts)}, and the embedding only {rows} rows")
    return (
        [texts.get(number, f"[PAD{number}]") for number in range(rows)],
        [int(kinds.get(number, TokenType.UNUSED)) for number in range(rows)],
    )


def _scores(tokenizer: Mapping[str, Any], texts: list[str]) -> list[float]:
    """SentencePiece merges the pair first whose token has the highest score: that of the first merge."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(tokenizer["model"]["merges"]):
        pair = merge.split(" ", 1) if isinstance(merge, str) else merge
        ranks.setdefault("".join(pair), rank)
    return [-float(ranks.get(text, len(ranks))) for text in texts]
