"""``macft data``: what it shows of rows is what a run would train on."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from harness.runs import write_jsonl
from helpers.docs import ROOT
from macft.data.formats import Place, Row
from macft.errors import MacftError
from macft.inspection.command import main
from macft.inspection.lengths import Lengths, histogram, percentile
from macft.inspection.row_view import RowView, shortened, visible
from macft.inspection.show import RowPrinter
from macft.model.load import load_tokenizer
from macft.model.settings import ModelConfig

ANSI = re.compile(r"\x1b\[([\d;]*)m")
ROWS = [
    {"prompt": "Two plus two?", "completion": "Four,\nof course."},
    {"prompt": "Peru?", "completion": "Lima"},
    {"prompt": "Say it often.", "completion": "often " * 60},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """The tiny model without weights that could be loaded."""
    folder = tmp_path_factory.mktemp("data-command") / "model"
    shutil.copytree(tiny_model_folder, folder)
    (folder / "model.safetensors").write_bytes(b"not weights")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "rows" / "train.jsonl", ROWS)
    return tmp_path / "rows"


Shown = Callable[..., str]


@pytest.fixture
def shown(model: Path, capsys: pytest.CaptureFixture[str]) -> Shown:
    """What the command prints, where standard output is no terminal."""

    def run(*arguments: object) -> str:
        main([*map(str, arguments), "--model", str(model)])
        return capsys.readouterr().out

    return run


def test_rows_are_shown_as_they_are_trained_on(rows: Path, model: Path, shown: Shown) -> None:
    output = shown(rows, "--mask-prompt", "--rows", 2)
    assert output.startswith(f"{rows}, train: 3 rows, for {model}, which knows 4,096 tokens\n")
    tokenizer = load_tokenizer(ModelConfig(), model)
    prompt = tokenizer.encode("<|im_start|>user\nTwo plus two?<|im_end|>\n<|im_start|>assistant\n")
    target = tokenizer.encode("Four,\nof course.<|im_end|>\n")
    head = f"row 1: {len(prompt) + len(target)} tokens, {len(prompt)} prompt, {len(target)} target\n"
    assert (
        f"\n{head}"
        + (
            "prompt  <|im_start|>user⏎\n"
            "        Two plus two?<|im_end|>⏎\n"
            "        <|im_start|>assistant⏎\n"
            "target  Four,⏎\n"
            "        of course.<|im_end|>⏎\n"
            "last token '\\n', after '<|im_end|>', which ends the answer\n"
        )
        in output
    )
    assert "row 2: " in output
    assert "row 3: " not in output
    assert "\x1b" not in output
    assert "max_seq_length 2,048 cuts no row" in output


def test_without_a_mask_all_but_the_first_token_is_a_target(rows: Path, shown: Shown) -> None:
    output = shown(rows, "--rows", 1)
    assert "prompts are trained on, too; with --mask-prompt only the answers are" in output
    assert "prompt  <|im_start|>\ntarget  user⏎\n        Two plus two?<|im_end|>⏎\n" in output


def test_what_is_cut_is_told(rows: Path, shown: Shown, capsys: pytest.CaptureFixture[str]) -> None:
    output = shown(rows, "--mask-prompt", "--row", 3, "--max-seq-length", 24)
    tokens, prompt, target, cut = map(
        int, re.search(r"row 3: (\d+) tokens, (\d+) \w+, (\d+) \w+, (\d+)", output).groups()
    )  # type: ignore[union-attr]
    assert prompt + target == 24
    assert tokens == 24 + cut
    assert f"dataset.max_seq_length cuts off the last {cut} tokens\n" in output
    assert "max_seq_length 24 cuts " in output
    assert "do not end with" not in output  # the whole row does
    with pytest.raises(MacftError, match="--max-seq-length: no train row has a target left after cutting; raise it"):
        shown(rows, "--mask-prompt", "--row", 3, "--max-seq-length", 5)
    short = capsys.readouterr().out
    assert "no target is left, so the row is dropped" in short
    assert "; no target is left in 3 of them, which a run drops" in short


def test_one_row_is_shown_whole_and_several_shortened(rows: Path, shown: Shown) -> None:
    write_jsonl(rows / "valid.jsonl", [{"prompt": "Say it.", "completion": "often " * 1000}] * 2)
    assert "characters ...]" in shown(rows, "--split", "valid")
    whole = shown(rows, "--split", "valid", "--row", 2, "--max-seq-length", 9999)
    assert "row 2: " in whole
    assert "row 1: " not in whole
    assert whole.count("often ") == 1000


def test_notes_and_errors_are_those_of_a_run(
    rows: Path, model: Path, shown: Shown, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write_jsonl(rows / "train.jsonl", [{**row, "id": 1} for row in ROWS])
    assert f"note: {rows}: columns that are not trained on: id\n" in shown(rows)
    small = tmp_path / "small"
    shutil.copytree(model, small)
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "vocab_size": 260}))
    with pytest.raises(
        MacftError, match=r"train row 1: token \d+ .* is beyond the model's vocabulary of 260; 3 of 3 rows"
    ):
        main([str(rows), "--model", str(small)])
    assert "row 1: " in capsys.readouterr().out  # the rows are shown before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.jsonl"], "dataset.path: nowhere.jsonl does not exist"),
        (["builtin:sql", "--row", "9999"], "--row: 9999 is not one of the train rows, 1 to 2000"),
        (["builtin:sql", "--rows", "-1"], "--rows: -1 must be 0 or more"),
        (["builtin:sql", "--column", "prompt"], "'prompt' is not FIELD=COLUMN"),
        (["builtin:sql", "--column", "question=x"], "--column question: no such field"),
        (["builtin:sql", "--column", "prompt=x"], "train row 1 has no column 'x'; it has family, messages"),
        (["builtin:sql", "--max-seq-length", "1"], "--max-seq-length: 1 must be 2 or more"),
    ],
)
def test_a_mistake_is_one_line(shown: Shown, arguments: list[str], words: str) -> None:
    with pytest.raises(MacftError) as error:
        shown(*arguments)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_split_without_rows_and_a_row_without_target_are_named(rows: Path, shown: Shown) -> None:
    with pytest.raises(MacftError, match=r"--split: .*rows has no test rows; it has train 3"):
        shown(rows, "--split", "test")


def test_a_mask_of_texts_is_told_by_the_option(tmp_path: Path, shown: Shown) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "Once."}\n')
    with pytest.raises(MacftError, match=r"text rows have no prompt to mask; use --no-mask-prompt$"):
        shown(tmp_path, "--mask-prompt")
    assert "row 1: " in shown(tmp_path, "--no-mask-prompt")


def test_columns_have_other_names(tmp_path: Path, shown: Shown) -> None:
    path = tmp_path / "faq.csv"
    path.write_text("question,the answer\nPeru?,Lima\n")
    with pytest.raises(MacftError, match=r"; --column renames fields: --column prompt=COLUMN --column "):
        shown(path)
    path.write_text("question,answer\nPeru?,Lima\n")
    with pytest.raises(MacftError) as error:
        shown(path)
    advice = str(error.value).partition("; --column renames fields: ")[2]
    output = shown(path, *shlex.split(advice), "--mask-prompt")
    assert "row 1 (line 2): " in output
    assert "target  Lima<|im_end|>⏎\n" in output


@pytest.mark.slow
def test_the_page_shows_what_is_printed(bundled_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bundled_model.is_dir()
    main(["builtin:sql", "--mask-prompt", "--rows", "1"])
    page = (ROOT / "docs/data.md").read_text()
    (block,) = re.findall(r"```\n(builtin:sql, train: .*?)\.\.\.\n```", page, re.DOTALL)
    assert capsys.readouterr().out.startswith(block)


def styled(text: str) -> list[tuple[str, str]]:
    """Pieces of a terminal's text, each with its style's numbers."""
    parts = ANSI.split(text)
    return [(style, piece) for style, piece in zip(["", *parts[1::2]], parts[::2], strict=True) if piece]


def test_prompt_and_target_have_two_colours(model: Path) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, color_system="standard", width=20, highlight=False)
    tokenizer = load_tokenizer(ModelConfig(), model)
    prompt, answer = "Ask<|im_end|>\nmany words, more than fit the width\n", "Answer [bold]\x1b[2Jnow<|im_end|>"
    encoded = tokenizer.encode(prompt)
    row = Row(np.array([*encoded, *tokenizer.encode(answer)], dtype=np.int32), len(encoded))
    printer = RowPrinter(console, tokenizer.all_special_tokens, None)
    printer.legend()
    printer.show(RowView.of(row, Place("here", "train", 7), tokenizer, 2048))
    pieces = styled(file.getvalue())
    colours = {style.split(";")[-1] for style, _ in pieces}
    assert {"36", "32"} < colours
    of_prompt = "".join(piece for style, piece in pieces if style.endswith("36"))
    of_target = "".join(piece for style, piece in pieces if style.endswith("32"))
    assert of_prompt == "promptAsk<|im_end|>⏎many words, more than fit the width⏎"
    assert of_target == "target, which is trained onAnswer [bold]\\x1b[2Jnow<|im_end|>"
    assert [piece for style, piece in pieces if "4" in style.split(";")] == ["<|im_end|>", "<|im_end|>"]
    plain = io.StringIO()
    printer = RowPrinter(Console(file=plain, force_terminal=True, no_color=True, width=20), [], None)
    printer.show(RowView.of(row, Place("here", "train", 7), tokenizer, 2048))
    assert "\nprompt  Ask<|im_end|>⏎\n        many words, more than fit the width⏎\ntarget  Answer" in plain.getvalue()


def test_text_is_made_visible() -> None:
    assert visible("a\r\n\tb\x00é\u202e") == "a\\r⏎\n\\tb\\x00é\\u202e"
    assert shortened("x" * 30, 30) == "x" * 30
    assert shortened("a" * 20 + "b" * 1000 + "c" * 10, 30) == f"{'a' * 20} [... 1,000 characters ...] {'c' * 10}"


def test_a_row_without_an_end_says_so(model: Path) -> None:
    tokenizer = load_tokenizer(ModelConfig(), model)
    tokens = np.array(tokenizer.encode("Never"), dtype=np.int32)
    view = RowView.of(Row(tokens, 0), Place("here", "train", 1), tokenizer, 2048)
    assert view.end.endswith("; no token ends the answer ('<|im_end|>' would)")
    assert view.prompt + view.target == "Never"


def test_percentiles_and_ranges_count_every_row() -> None:
    values = np.array([*range(1, 101), 5000])
    assert [percentile(values, percent) for percent in (0, 50, 99, 100)] == [1, 51, 100, 5000]
    bins = histogram(values)
    assert bins[0] == ("0 to 9", 9)
    assert bins[1] == ("10 to 19", 10)
    assert bins[-1] == ("110 or more", 1)
    for shape in ([7], [7, 7], [3, 900], [1] * 99 + [10**6], list(range(50, 60))):
        counted = histogram(np.array(shape))
        assert sum(count for _, count in counted) == len(shape)
        assert len(counted) <= 13
    assert histogram(np.array([7])) == [("7", 1)]


def test_what_a_limit_cuts_is_counted() -> None:
    rows = [Row(np.zeros(length, np.int32), prompt) for length, prompt in ((10, 0), (20, 12), (70, 50))]
    lengths = Lengths.of(rows)
    assert lengths.targets.tolist() == [9, 8, 20]
    assert lengths.cut_line(70) == "max_seq_length 70 cuts no row"
    assert lengths.cut_line(40) == (
        "max_seq_length 40 cuts 1 of 3 rows (33.3%) and 30.0% of all tokens; no target is left in 1 of them, "
        "which a run drops"
    )
