"""Writing to two models: what is drawn, said and shown; and the boxes, clicked."""

import copy
import dataclasses
import math
import re
from functools import partial
from html import unescape

import pytest
import torch
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

from more import talk as shown
from more import widgets
from more.labelling import Question
from more.talk import BEFORE, Reply, Talk, token_texts, visible
from more.widgets import writing_box
from practice.cells import import_cells
from tests.conftest import refused
from utils.data import load_tokenizer
from utils.models import RewardModel, freeze, load_causal_lm
from utils.rollout import draw
from utils.settings import NOTEBOOKS, ROOT, TINY


@pytest.fixture(scope="module")
def talk(world):
    """The tiny world's model, and a copy whose weights have moved a little."""
    reference = load_causal_lm(world / "model")
    policy = copy.deepcopy(reference)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 0.02 * torch.randn_like(weight)
    reward_model = RewardModel(copy.deepcopy(reference.base_model))
    models = map(freeze, (reference, policy, reward_model))
    return Talk(*models, load_tokenizer(world / "model"), TINY)


def test_what_is_written_is_drawn_and_judged_as_by_hand(talk):
    """From whole forward passes: drawn at one temperature, and judged at PPO's."""
    models = (*talk.models.values(), talk.reward_model, talk.tokenizer)
    own = Talk(*models, dataclasses.replace(TINY, temperature=2.0))
    replies = own.write("  the plot \n", temperature=0.5, seed=3)
    for name, lm in talk.models.items():
        ids, generator = talk.encode("the plot"), torch.Generator().manual_seed(3)
        n, reply = len(ids), replies[name]
        for token in reply.tokens:
            logits = lm(torch.tensor([ids])).logits[:, -1] / 0.5
            assert draw(logits.softmax(dim=-1), generator).item() == token
            ids = [*ids, token]
        ids = torch.tensor([ids])
        before, after = (
            (lm(ids).logits[0] / 2.0).log_softmax(dim=-1) for lm in talk.models.values()
        )
        by_hand = (after - before)[:-1].gather(1, ids[0, 1:, None])[n - 1 :, 0]
        assert reply.log_ratios == pytest.approx(by_hand.tolist(), abs=1e-4)
        assert by_hand.abs().max() > 0.05
        raw = talk.reward_model(ids, torch.ones_like(ids)).item()
        assert reply.raw == pytest.approx(raw, abs=1e-5)
        assert reply.reward == pytest.approx(2 / (1 + math.exp(-raw)) - 1, abs=1e-6)
        text = talk.tokenizer.decode(ids[0], skip_special_tokens=True)
        assert reply.text == text and reply.ended == (ids[0, -1] == talk.eos_id)
    cut = talk.reply(BEFORE, [5], dull := talk.encode("is dull ."))
    assert not cut.ended and cut.response == talk.tokenizer.decode(dull)


def test_what_cannot_be_read_is_named(talk):
    refused("the prompt is empty; write a few words", talk.write, " \n\t")
    refused("holds .*endoftext.*, which ends texts", talk.write, "a <|endoftext|>")
    refused("surrogates not allowed", talk.write, "half \ud83d of it")
    says = "has 97 tokens; shorten it to 96, which leave room"
    refused(says, talk.write, "dull " * 97)
    assert len(talk.encode("dull " * 96)) == 96  # 128 places less the response's 32
    refused("a temperature from 0.1 to 2.0, not 0.0", talk.write, "the film", 0.0)


def test_each_token_adds_its_letters_and_no_half_ones(talk):
    texts, text = partial(token_texts, talk.tokenizer, [5, 6]), "café 😀 是 plain ."
    pieces = texts([*(response := talk.encode(text)), talk.eos_id])
    assert pieces[-1] == "EOS" and "".join(pieces[:-1]) == text
    assert len(pieces) == len(response) + 1 and not any("\ufffd" in x for x in pieces)
    assert "\ufffd" in "".join(texts(talk.encode("😀")[:-1]))  # breaks off within one


def read(html):
    """The text of a piece of HTML, and its tags."""
    return unescape(re.sub("<[^>]*>", "", html)), re.findall(r"<(\w+)", html)


def test_what_is_shown_is_escaped_and_coloured_by_its_sign_and_size():
    pieces, ratios = [" <b>", "\x00", ' "it\'s"', "EOS"], [1.0, -0.5, -9.0, 0.0]
    html = shown.shaded_html(pieces, ratios)
    assert read(html) == (' <b>⟨U+0000⟩ "it\'s" EOS', ["span"] * 5)
    # 0.6 at FULL_COLOUR, half at half of it, and no stronger beyond
    assert re.findall(r'(\d+), \d+, \d+, ([\d.]+)\)" title="(\S+) nats"', html) == [
        ("59", "0.30", "+1.00"), ("200", "0.15", "-0.50"),
        ("200", "0.60", "-9.00"), ("200", "0.00", "+0.00"),
    ]  # fmt: skip
    text = shown.shaded_text([" so", " dull", "<i>", "EOS"], [0.04, -1.25, 0.05, 2])
    assert text == " so dull[-1.2]<i>[+0.1] EOS[+2.0]"
    reply = Reply("<u>", "<img src=x>", [1], ["<script>"], [0.0], 0.0, 0.5, False)
    text, tags = read(shown.card(reply))
    assert set(tags) == {"p", "b", "br", "span"}
    assert text == "<u>, reward +0.50<img src=x><script> …"
    assert visible("a\x00é 好\u202e👩") == "a⟨U+0000⟩é 好⟨U+202E⟩👩"


def test_what_was_steered_is_a_mean_over_the_places():
    steered = import_cells(NOTEBOOKS["4"], "steered-functions")["steered"]
    pairs = [([1, 2, 1], [1.0, 0.0, 2.0]), ([2, 1, 3], [-3.0, 6.0, 8.0])]
    pairs.append(([1, 2, 3], [1.0, -3.0, 9.0]))
    replies = [Reply("", "", tokens, [], x, 0.0, 0.0, True) for tokens, x in pairs]
    assert steered(replies, least=3) == {2: -2.0, 1: 2.5}
    assert list(steered(replies, least=2)) == [2, 1, 3]


def test_a_click_writes_and_a_bad_prompt_is_a_sentence(talk):
    box = writing_box(talk, "the plot")
    prompt, _, seed, button, _ = box.children
    said = []
    for field, value in ((seed, 3), (seed, 4), (prompt, "<|endoftext|>")):
        field.value = value
        button.click()
        said.append(box.result.data)
    assert "the plot" in said[0] and "the plot" in said[1] != said[0]
    assert "the prompt holds &#x27;&lt;|endoftext|&gt;" in said[2]


def test_a_slider_that_is_let_go_calls_again(monkeypatch):
    """With the default values first; where nobody is there, once, without sliders."""
    shown, calls = [], []

    def look(rate=0.5, rollout=2):
        calls.append((rate, rollout))
        return "a picture"

    monkeypatch.setattr(widgets, "display", shown.append)
    for here in (False, True):
        monkeypatch.setattr(widgets, "somebody", lambda here=here: here)
        widgets.sliders(look, rate=(0.0, 1.0, 0.1), rollout=(0, 3))
    picture, box = shown
    rate, rollout, _ = box.children
    assert picture == "a picture"
    assert not rate.continuous_update and rollout.continuous_update
    rate.value = 0.7
    assert calls == [(0.5, 2), (0.5, 2), (0.7, 2)]


def test_a_blind_comparison_hides_sides_and_a_reader_follows_his_judge():
    """Lesson 4's functions: balanced, in a random order, another for another seed."""
    four = import_cells(NOTEBOOKS["4"], "blind-questions", "reader")
    pairs = [(f"p{i}", f" old {i}", f" new {i}") for i in range(30)]
    orders = set()
    for seed in range(50):
        questions = four["blind_questions"]([("p", " x", " x"), *pairs], seed)
        sides = tuple("old" in q.left for q in questions)
        assert len(sides) == 20 and sum(sides) == 10
        orders.add(sides)
    assert len(orders) == 50
    ask = [Question("a", "b", "bb"), Question("a", "bbb", "b"), Question("a", "b", "c")]
    longer = lambda texts: [*map(len, texts)]  # noqa: E731
    assert four["preferred"](ask, longer) == ["bb", "bbb", None]
    taken = four["simulated"](ask * 300, longer)
    better = sum(x in ("bb", "bbb") for x in taken)
    assert 540 < better < 600 and 120 < taken.count("c") < 180


@pytest.mark.slow
def test_a_box_is_shown_only_where_somebody_can_click():
    """Who executes a notebook by program says that nobody answers; a browser not."""
    show = "import ipywidgets, more.widgets; more.widgets.show(ipywidgets.Button())"
    notebook = new_notebook(cells=[new_code_cell(show), new_code_cell(show)])
    client = NotebookClient(notebook, resources={"metadata": {"path": str(ROOT)}})
    with client.setup_kernel():
        for i, cell in enumerate(notebook.cells):
            client.kc.allow_stdin = bool(i)
            client.execute_cell(cell, i)
    (alone,), (person,) = (cell.outputs for cell in notebook.cells)
    assert "stands here when you run this yourself" in alone.text
    assert person.output_type == "display_data"
