"""Shows rows and their lengths: prompt and target in two colours, or on labelled lines where there are no colours."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.text import Text

from macft.inspection.lengths import PERCENTILES, Lengths, histogram, percentile
from macft.inspection.row_view import RowView, shortened, visible

_PROMPT, _TARGET = "cyan", "bold green"
_WIDEST_BAR = 40
_WHOLE = 2**31


class RowPrinter:
    """Prints row by row; ``special_tokens`` are underlined where there are colours.

    ``most_characters`` is how much of a prompt or target is shown; None for all of it.
    """

    def __init__(self, console: Console, special_tokens: Iterable[str], most_characters: int | None):
        self._console = console
        self._special = sorted(filter(None, special_tokens), key=len, reverse=True)
        self._most = most_characters or _WHOLE
        self._has_colours = console.is_terminal and not console.no_color

    def legend(self) -> None:
        """Says which colour is which."""
        if self._has_colours:
            self._print(Text.assemble(("prompt", _PROMPT), " ", ("target, which is trained on", _TARGET)))

    def show(self, row: RowView) -> None:
        """Prints one row."""
        total = row.prompt_tokens + row.target_tokens + row.cut_tokens
        head = f"{row.place.in_split}: {total:,} tokens, {row.prompt_tokens:,} prompt, {row.target_tokens:,} target"
        cut = f", {row.cut_tokens:,} cut off" if row.cut_tokens else ""
        self._print(Text(f"\n{head}{cut}", style="bold"))
        prompt, target = (visible(shortened(text, self._most)) for text in (row.prompt, row.target))
        if self._has_colours:
            text = Text.assemble((prompt, _PROMPT), (target, _TARGET))
            text.highlight_words(self._special, "underline")
            if text.plain.endswith("\n"):
                text.right_crop(1)
            self._print(text)
        else:
            for label, part in (("prompt", prompt), ("target", target)):
                for number, line in enumerate(part.removesuffix("\n").split("\n")):
                    self._print(Text(f"{label if number == 0 else '':8}{line}"))
        self._print(Text(row.end, style="dim" if self._has_colours else ""))

    def _print(self, text: Text) -> None:
        # Lines are broken by the terminal, so that what is copied from it is what was printed.
        self._console.print(text, soft_wrap=True)


def show_lengths(lengths: Lengths, longest: int, console: Console) -> None:
    """Prints percentiles, what is cut to ``longest`` tokens, and a histogram."""
    lines = ["", f"{'':14}" + "".join(f"{head:>9}" for head in PERCENTILES)]
    for name, values in (("tokens", lengths.tokens), ("target tokens", lengths.targets)):
        lines.append(f"{name:14}" + "".join(f"{percentile(values, percent):>9,}" for percent in PERCENTILES.values()))
    share = int(lengths.targets.sum()) / int(lengths.tokens.sum())
    lines += [f"{share:.0%} of {int(lengths.tokens.sum()):,} tokens are targets; {lengths.cut_line(longest)}", ""]
    bins = histogram(lengths.tokens)
    labels, counts = max(len(label) for label, _ in bins), max(len(f"{count:,}") for _, count in bins)
    widest = max(1, min(_WIDEST_BAR, console.width - labels - max(counts, 4) - 4))
    lines.append(f"{'tokens':{labels}}  {'rows':>{max(counts, 4)}}")
    most = max(count for _, count in bins)
    for label, count in bins:
        bar = "█" * -(-count * widest // most)
        lines.append(f"{label:{labels}}  {count:>{max(counts, 4)},}  {bar}".rstrip())
    console.print("\n".join(lines), markup=False, soft_wrap=True)
