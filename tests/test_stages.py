"""A model cut into its blocks: the parts make the whole, and models that can't be cut are told."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from harness.families import configuration, new_model
from macft.model.blocks.cut_model import CutModel
from macft.model.blocks.ends import AFTER, BEFORE, BOTH_ENDS, find_ends
from macft.model.execution import WeightFormat
from macft.model.head import split_head
from macft.model.shape import shape_of

TOKENS = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])
# Scaled embeddings, windows, experts, state spaces, blocks of several kinds, a wrapper, hidden states given by name.
CUT = ["llama", "gemma3_text", "gemma3", "qwen3_moe", "gpt_oss", "jamba", "qwen3_next", "lfm2", "gpt2", "gptj"]


def in_parts(cut: CutModel, tokens: mx.array) -> mx.array:
    """What the model makes of ``tokens``, block by block."""
    entry = cut.enter(tokens)
    hidden = entry.hidden
    for number, arguments in enumerate(entry.arguments):
        hidden = cut.block(number, hidden, arguments)
    return cut.leave(tokens, hidden)


@pytest.mark.parametrize("family", CUT)
def test_the_parts_make_the_whole(family: str) -> None:
    model = new_model(configuration(family))
    model.eval()
    cut = CutModel(model)
    assert cut.obstacle(TOKENS) is None
    assert mx.array_equal(in_parts(cut, TOKENS), model(TOKENS))


@pytest.mark.parametrize(
    ("family", "changes", "before", "after", "both"),
    [
        ("llama", {"tie_word_embeddings": False}, {"embed_tokens"}, {"norm", "lm_head"}, set()),
        ("llama", {"tie_word_embeddings": True}, set(), {"norm"}, {"embed_tokens"}),
        ("gpt2", {}, {"wpe"}, {"ln_f"}, {"wte"}),
    ],
)
def test_the_ends_of_a_model(
    family: str, changes: dict[str, object], before: set[str], after: set[str], both: set[str]
) -> None:
    """Each array outside of the blocks once, by who needs it; and their sizes, without the arrays."""
    config = configuration(family) | changes
    model = new_model(config)
    found = {part.ends: {name.split(".")[-2] for name in part.names} for part in find_ends(model)}
    assert found == {frozenset({BEFORE}): before, frozenset({AFTER}): after, BOTH_ENDS: both}
    shape = shape_of(config, "config.json")
    sizes = {name: value.size for name, value in tree_flatten(model.parameters())}
    outside = [name for name in sizes if name.split(".")[-2] in before | after | both]
    first = sum(size for name, size in sizes.items() if name.split(".")[-2] in before | both)
    floats = WeightFormat("float32")
    assert shape.outside_bytes(floats, {BEFORE}) == 4 * first
    assert shape.outside_bytes(floats, ()) == 0
    assert sum(shape.block_bytes(floats)) == 4 * (shape.parameters - sum(sizes[name] for name in outside))


@pytest.mark.parametrize(
    ("family", "reason"),
    [("gemma4_text", "its own code fails without them"), ("afm7", "depend on other blocks"), ("nanbeige", "once each")],
)
def test_a_model_whose_blocks_share_more_than_hidden_states_can_t_be_cut(family: str, reason: str) -> None:
    """Keys and values of another block, or blocks that are run several times."""
    model = new_model(configuration(family))
    model.eval()
    assert reason in str(CutModel(model).obstacle(TOKENS))


class Counting(nn.Module):
    """A model that adds up what its blocks return, which hidden states alone don't show."""

    def __init__(self, passes: int = 1):
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.layers = [nn.Linear(8, 8) for _ in range(3)]
        self.passes = passes

    def __call__(self, tokens: mx.array) -> mx.array:
        hidden, seen = self.embed(tokens), []
        for layer in self.layers:
            hidden = layer(hidden)
            seen.append(hidden)
        return hidden + (seen[0] if self.passes > 1 else 0)


def test_what_the_end_makes_of_an_earlier_block_is_found() -> None:
    assert CutModel(Counting()).obstacle(TOKENS) is None
    assert "depends on more than the last one" in str(CutModel(Counting(passes=2)).obstacle(TOKENS))


def test_the_head_is_found_without_computing_a_block() -> None:
    model = new_model(configuration("llama"))
    for block in model.layers:
        block.update_modules({"mlp": nn.Linear(1, 1)})  # which would fail
    with CutModel(model).skipped():
        assert split_head(model) is not None


def test_the_model_is_as_it_was() -> None:
    model = new_model(configuration("llama"))
    before, kinds = model(TOKENS), [type(block) for block in model.layers]
    cut = CutModel(model)
    cut.enter(TOKENS)
    with pytest.raises(ValueError, match="broken"), cut.skipped():
        raise ValueError("broken")
    assert [type(block) for block in model.layers] == kinds
    assert mx.array_equal(model(TOKENS), before)
