"""Results of a run as people read them: losses, perplexities, shares and a user's own numbers, told apart by name."""

from __future__ import annotations

_TITLES = {"rouge_l": "ROUGE-L"}


def result_name(name: str) -> str:
    """The name in words; that of a user's own metric as it is."""
    if "." in name:
        return name
    return _TITLES.get(name) or name.replace("valid_loss", "validation loss").replace("_", " ")


def result_text(name: str, value: float) -> str:
    """A result with as many digits as mean something; ``name`` may end in ``_before``."""
    kind = _kind(name)
    if kind == "share":
        return f"{value:.1%}"
    return f"{value:.4g}" if kind == "own" else f"{value:,.{3 if kind == 'loss' else 2}f}"


def change_text(name: str, before: float, after: float) -> str:
    """How a result has changed."""
    kind, change = _kind(name), after - before
    if kind == "share":
        return f"{100 * change:+.1f} points"
    return f"{change:+.4g}" if kind == "own" else f"{change:+,.{3 if kind == 'loss' else 2}f}"


def _kind(name: str) -> str:
    name = name.removesuffix("_before")
    if "." in name:
        return "own"
    return "loss" if name.endswith("loss") else "perplexity" if name == "perplexity" else "share"
