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
from more.blind import BlindTest
from more.talk import BEFORE, Reply, Talk, steered, token_texts, visible
from more.widgets import blind_box, writing_box
from tests.test_blind import PAIRS
from utils.data import load_tokenizer, pad
from utils.models import RewardModel, freeze, load_causal_lm
from utils.rollout import sample_responses
from utils.runs import ROOT
from utils.settings import TINY


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


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_what_streams_is_what_sample_responses_draws(talk, temperature):
    prompt = talk.encode("the film is")
    assert prompt == talk.encode("  the film is \n")
    for name, lm in talk.models.items():
        generator = torch.Generator().manual_seed(3)
        how = (talk.eos_id, TINY.max_new_tokens, temperature, generator)
        ids, _, mask = sample_responses(lm, *pad([prompt], 0, side="left"), *how)
        drawn = ids[0, -mask.shape[1] :][mask[0].bool()].tolist()
        assert [*talk.stream(name, prompt, temperature, 3)] == drawn


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_reply_is_judged_as_by_hand(talk, temperature):
    """From whole forward passes, at the temperature that PPO trained with."""
    models = (*talk.models.values(), talk.reward_model, talk.tokenizer)
    own = Talk(*models, dataclasses.replace(TINY, temperature=temperature))
    for reply in own.write("the plot", seed=1).values():
        prompt = talk.encode("the plot")
        ids = torch.tensor([prompt + reply.tokens])
        before, after = (
            (lm(ids).logits[0] / temperature).log_softmax(dim=-1)
            for lm in talk.models.values()
        )
        by_hand = (after - before)[:-1].gather(1, ids[0, 1:, None])[
            len(prompt) - 1 :, 0
        ]
        assert reply.log_ratios == pytest.approx(by_hand.tolist(), abs=1e-4)
        assert by_hand.abs().max() > 0.05
        raw = talk.reward_model(ids, torch.ones_like(ids)).item()
        assert reply.raw == pytest.approx(raw, abs=1e-5)
        assert reply.reward == pytest.approx(2 / (1 + math.exp(-raw)) - 1, abs=1e-6)
        text = talk.tokenizer.decode(ids[0], skip_special_tokens=True)
        assert reply.text == text and reply.ended == (ids[0, -1] == talk.eos_id)
    cut = talk.reply(BEFORE, prompt, dull := talk.encode("is dull ."))
    assert not cut.ended and cut.response == talk.tokenizer.decode(dull)


def test_the_same_seed_draws_the_same_and_the_same_model_says_the_same(talk):
    drawn = [talk.write("the film", seed=s) for s in (5, 5, 0, 1, 2, 3, 4)]
    assert drawn[0] == drawn[1] and len({x[BEFORE].response for x in drawn}) > 3
    one = talk.models[BEFORE]
    same = Talk(one, one, talk.reward_model, talk.tokenizer, TINY).write("the film")
    before, after = same.values()
    assert before.response == after.response and set(after.log_ratios) == {0.0}
    talk.write("dull " * 96)  # 128 places less the response's 32


REFUSED = {
    "the prompt is empty; write the first words": (" \n\t", {}),
    "holds .*endoftext.*, which ends a text; take it": ("a <|endoftext|> b", {}),
    "half a character": ("half \ud83d of it", {}),
    "has 97 tokens, and the model reads 96 at most before a": ("dull " * 97, {}),
    "temperature must be from 0.1 to 2, got 0": ("the film", {"temperature": 0.0}),
    "from 0.1 to 2, got nan": ("the film", {"temperature": math.nan}),
    "seed must be from 0 to 2147483647, got -1": ("the film", {"seed": -1}),
}


def test_what_cannot_be_read_is_named(talk):
    for said, (prompt, changes) in REFUSED.items():
        with pytest.raises(ValueError, match=said):
            talk.write(prompt, **changes)


@pytest.mark.parametrize("text", ["café 😀 naïve", "是 好 看", "plain words ."])
def test_each_token_adds_its_letters_and_no_half_ones(talk, text):
    texts, response = partial(token_texts, talk.tokenizer, [5, 6]), talk.encode(text)
    pieces = texts([*response, talk.eos_id])
    assert pieces[-1] == "EOS" and "".join(pieces[:-1]) == text
    assert len(pieces) == len(response) + 1 and not any("\ufffd" in x for x in pieces)
    # A response that breaks off in the middle of a letter hides nothing
    assert "\ufffd" in "".join(texts(talk.encode("😀")[:-1]))


def read(html):
    """The text of a piece of HTML, and its tags."""
    return unescape(re.sub("<[^>]*>", "", html)), re.findall(r"<(\w+)", html)


def test_what_is_shown_is_escaped_and_coloured_by_its_sign_and_size():
    pieces, ratios = [" <b>", "\x00", ' "it\'s"', "EOS"], [1.0, -0.5, -9.0, 0.0]
    html = shown.shaded_html(pieces, ratios)
    assert read(html) == (' <b>␀ "it\'s" EOS', ["span"] * 5)
    # 0.6 at FULL_COLOUR, half at half of it, and no stronger beyond
    assert re.findall(r'(\d+), \d+, \d+, ([\d.]+)\)" title="(\S+) nats"', html) == [
        ("59", "0.30", "+1.00"), ("200", "0.15", "-0.50"),
        ("200", "0.60", "-9.00"), ("200", "0.00", "+0.00"),
    ]  # fmt: skip
    text = shown.shaded_text([" so", " dull", "<i>", "EOS"], [0.04, -1.25, 0.05, 2])
    assert text == " so dull[-1.2]<i>[+0.1] EOS[+2.0]"
    for shade in (shown.shaded_html, shown.shaded_text):
        with pytest.raises(ValueError, match="2 tokens need as many .*, got 1"):
            shade(["a", "b"], [0.0])
    words = (["<script>alert(1)</script>"], [0.0], 0.0, 0.5, False)
    reply = Reply("<u>", "<img src=x onerror=alert(1)>", [1], *words)
    text, tags = read(shown.card(reply))
    assert set(tags) == {"p", "b", "br", "span"}
    assert text == f"<u>, reward +0.50<img src=x onerror=alert(1)>{words[0][0]} …"
    assert visible("a\x00b\nc\x7f\u202ed") == "a␀b␊c⟨U+007F⟩⟨U+202E⟩d"
    assert visible("é 👨\u200d👩 好") == "é 👨\u200d👩 好"
    # What was steered is a mean over the places
    pairs = [([1, 2, 1], [1.0, 0.0, 2.0]), ([2, 1, 3], [-3.0, 6.0, 8.0])]
    pairs.append(([1, 2, 3], [1.0, -3.0, 9.0]))
    replies = [Reply("", "", tokens, [], x, 0.0, 0.0, True) for tokens, x in pairs]
    assert steered(replies, least=3) == {2: -2.0, 1: 2.5}
    assert list(steered(replies, least=2)) == [2, 1, 3]


def test_a_click_writes_and_a_bad_prompt_is_a_sentence(talk):
    prompt, temperature, seed, button, answer = writing_box(talk, "the plot").children
    first = answer.value
    assert first.count("reward") == 2 and "the plot" in first
    assert temperature.min == pytest.approx(0.1)
    for field, value, said in (
        (seed, 3, "the plot"),
        (prompt, "<b>", "&lt;b&gt;"),
        (prompt, " ", "the prompt is empty; write"),
    ):
        field.value, before = value, answer.value
        button.click()
        assert said in answer.value != before and "<b></b>" not in answer.value


def test_clicks_choose_until_all_are_done():
    test, shown = BlindTest(PAIRS, seed=1, most=3), []
    said, row = blind_box(test).children
    left, right, undo = row.children
    for n in range(3):
        _, one, other = test.shown()
        shown.append((one, other))
        assert re.search(f"pair {n + 1} of 3.*{one}.*{other}", said.value)
        assert not re.search("before|after", said.value)
        left.click()
    assert "All 3 pairs are done" in said.value and left.disabled and right.disabled
    undo.click()
    assert "pair 3 of 3" in said.value and not right.disabled
    right.click()
    pairs = zip(test.pairs, test.result(), strict=True)
    assert [pair[x] for pair, x in pairs] == [shown[0][0], shown[1][0], shown[2][1]]


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
