"""Layouts: which rank holds which blocks."""

from __future__ import annotations

import pytest

from macft.parallel.stage_layout import Stage, StageLayout, even_layout


def test_blocks_are_divided_evenly_and_what_is_left_over_goes_to_the_first() -> None:
    layout = even_layout(10, [0, 1, 2, 3])
    assert [list(stage.blocks) for stage in layout.pipelines[0]] == [[0, 1, 2], [3, 4, 5], [6, 7], [8, 9]]
    assert str(even_layout(4, [2, 0])) == "rank 2: blocks 0-1 > rank 0: blocks 2-3"
    assert StageLayout.from_data(layout.to_data()) == layout


def test_two_pipelines_of_two() -> None:
    layout = even_layout(5, [0, 1, 2, 3], pipelines=2)
    assert layout.place_of(3) == (1, 1)
    assert layout.place_of(4) is None
    assert layout.blocks == 5


@pytest.mark.parametrize(
    "stages", [[], [(0, 0, 2), (1, 3, 4)], [(0, 1, 2)], [(0, 0, 2), (0, 2, 4)], [(0, 0, 2), (1, 2, 2)]]
)
def test_what_is_no_layout(stages: list[tuple[int, int, int]]) -> None:
    with pytest.raises(ValueError, match=r"every rank is used once|stages follow each other"):
        StageLayout((tuple(Stage(*numbers) for numbers in stages),))


def test_more_stages_than_blocks() -> None:
    with pytest.raises(ValueError, match="3 stages are more than the model's 2 blocks"):
        even_layout(2, [0, 1, 2])
