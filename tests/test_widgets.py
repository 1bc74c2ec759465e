"""The boxes of notebook 9, clicked by a program."""

import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

from tests.test_blind import PAIRS
from tests.test_talk import talk  # noqa: F401
from utils.blind import BlindTest
from utils.support.notebook import ROOT
from utils.support.widgets import blind_box, writing_box


def test_a_click_writes_and_a_bad_prompt_is_a_sentence(talk):  # noqa: F811
    box = writing_box(talk, "the plot")
    prompt, temperature, seed, button, answer = box.children
    first = answer.value
    assert first.count("reward") == 2 and "the plot" in first
    seed.value = 3
    button.click()
    assert answer.value != first
    prompt.value = "<b>"
    button.click()
    assert "&lt;b&gt;" in answer.value and "<b></b>" not in answer.value
    prompt.value = " "
    button.click()
    assert answer.value.startswith("the prompt is empty; write")
    assert temperature.min == pytest.approx(0.1)


def test_clicks_choose_until_all_are_done():
    test = BlindTest(PAIRS, seed=1, most=3)
    said, row = blind_box(test).children
    left, right, undo = row.children
    lefts, rights = [], []
    for n in range(3):
        lefts.append(test.shown()[1])
        rights.append(test.shown()[2])
        assert f"pair {n + 1} of 3" in said.value
        shown = test.shown()
        assert said.value.index(shown[1]) < said.value.index(shown[2])
        assert "before" not in said.value and "after" not in said.value
        left.click()
    assert "All 3 pairs are done" in said.value and left.disabled and right.disabled
    undo.click()
    assert "pair 3 of 3" in said.value and not right.disabled
    right.click()
    chosen = zip(test.pairs, test.result(), strict=True)
    assert [pair[whose] for pair, whose in chosen] == [*lefts[:2], rights[2]]


SHOW = """
from ipywidgets import Button
from utils.support.widgets import show
show(Button(description="here"))
"""


@pytest.mark.slow
def test_a_box_is_shown_only_where_somebody_can_click():
    """Who executes a notebook by program says that nobody answers; a browser not."""
    notebook = new_notebook(cells=[new_code_cell(SHOW), new_code_cell(SHOW)])
    client = NotebookClient(notebook, resources={"metadata": {"path": str(ROOT)}})
    with client.setup_kernel():
        for i, cell in enumerate(notebook.cells):
            client.kc.allow_stdin = bool(i)
            client.execute_cell(cell, i)
    alone, person = (cell.outputs for cell in notebook.cells)
    assert [o.output_type for o in alone] == ["stream"]
    assert "stands here when you run this yourself" in alone[0].text
    assert [o.output_type for o in person] == ["display_data"]
