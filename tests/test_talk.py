"""Writing to two models: what is drawn, what is said of it, and what is shown."""

import copy
import dataclasses
import math
from html.parser import HTMLParser

import pytest
import torch

from utils.data import load_tokenizer, pad
from utils.models import RewardModel, freeze, load_causal_lm
from utils.rollout import sample_responses
from utils.settings import TINY
from utils.talk import (
    AFTER,
    BEFORE,
    Reply,
    Talk,
    card,
    shaded_html,
    shaded_text,
    steered,
    token_texts,
    visible,
)


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
    for name, lm in talk.models.items():
        generator = torch.Generator().manual_seed(3)
        how = (talk.eos_id, TINY.max_new_tokens, temperature, generator)
        ids, _, mask = sample_responses(lm, *pad([prompt], 0, side="left"), *how)
        drawn = ids[0, -mask.shape[1] :][mask[0].bool()].tolist()
        assert [*talk.stream(name, prompt, temperature, 3)] == drawn


def test_a_reply_is_judged_as_by_hand(talk):
    """log π - log π_ref from whole forward passes, and the logit of the whole text."""
    for reply in talk.write("the plot", seed=1).values():
        prompt = talk.encode("the plot")
        ids = torch.tensor([prompt + reply.tokens])
        logs = {
            name: lm(ids).logits[0].log_softmax(dim=-1)
            for name, lm in talk.models.items()
        }
        by_hand = [
            (logs[AFTER][place, token] - logs[BEFORE][place, token]).item()
            for place, token in enumerate(ids[0, 1:].tolist())
        ][len(prompt) - 1 :]
        assert reply.log_ratios == pytest.approx(by_hand, abs=1e-4)
        assert max(map(abs, by_hand)) > 0.1
        raw = talk.reward_model(ids, torch.ones_like(ids)).item()
        assert reply.raw == pytest.approx(raw, abs=1e-5)
        by_hand = 2 / (1 + math.exp(-raw)) - 1
        assert reply.reward == pytest.approx(by_hand, abs=1e-6)
        text = talk.tokenizer.decode(ids[0], skip_special_tokens=True)
        assert reply.text == text and reply.ended == (ids[0, -1] == talk.eos_id)


def test_the_colours_are_those_of_the_temperature_that_was_trained_with(talk):
    warm = dataclasses.replace(TINY, temperature=2.0)
    models = (*talk.models.values(), talk.reward_model, talk.tokenizer)
    prompt, response = talk.encode("the plot"), talk.encode("is dull .")
    ids = torch.tensor([prompt + response])
    logs = [(lm(ids).logits[0] / 2).log_softmax(dim=-1) for lm in talk.models.values()]
    place, first = len(prompt) - 1, response[0]
    found = Talk(*models, warm).reply(BEFORE, prompt, response)
    by_hand = (logs[1] - logs[0])[place, first].item()
    assert found.log_ratios[0] == pytest.approx(by_hand, abs=1e-5)
    assert not found.ended and found.response == talk.tokenizer.decode(response)


def test_the_same_seed_draws_the_same_and_the_same_model_says_the_same(talk):
    twice = [talk.write("the film", seed=5) for _ in range(2)]
    assert twice[0] == twice[1]
    drawn = {talk.write("the film", seed=s)[BEFORE].response for s in range(8)}
    assert len(drawn) > 4
    one = talk.models[BEFORE]
    same = Talk(one, one, talk.reward_model, talk.tokenizer, TINY).write("the film")
    assert same[BEFORE].response == same[AFTER].response
    assert set(same[AFTER].log_ratios) == {0.0}


def test_a_prompt_is_read_without_the_spaces_around_it(talk):
    assert talk.encode("  the film is \n") == talk.encode("the film is")


@pytest.mark.parametrize(
    "prompt, said",
    [
        ("", "the prompt is empty; write the first words"),
        (" \n\t", "the prompt is empty"),
        ("so <|endoftext|> dull", "holds '<|endoftext|>', which ends a text; take it"),
        ("half \ud83d of it", "half a character"),
        ("dull " * 2000, "has 2,000 tokens, and the model reads 96 at most before a"),
    ],
)
def test_a_prompt_that_cannot_be_read_is_named(talk, prompt, said):
    with pytest.raises(ValueError, match=r".*".join(said.split("'<|endoftext|>'"))):
        talk.write(prompt)
    assert len(talk.encode("dull " * 96)) == 96  # 128 less the response's 32


def test_the_longest_prompt_gets_a_whole_response(talk):
    replies = talk.write("dull " * talk.longest, seed=2)
    assert all(reply.tokens for reply in replies.values())


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"temperature": 0.0}, "temperature must be from 0.1 to 2, got 0.0"),
        ({"temperature": float("nan")}, "temperature must be from 0.1 to 2, got nan"),
        ({"seed": -1}, "seed must be from 0 to 2147483647, got -1"),
    ],
)
def test_a_slider_out_of_range_is_named(talk, changes, said):
    with pytest.raises(ValueError, match=said):
        talk.write("the film", **changes)


@pytest.mark.parametrize("text", ["café 😀 naïve", "是 好 看", "plain words ."])
def test_each_token_adds_its_letters_and_no_half_ones(talk, text):
    prompt, response = talk.encode("the film"), talk.encode(text)
    pieces = token_texts(talk.tokenizer, prompt, [*response, talk.eos_id])
    assert pieces[-1] == "EOS" and "".join(pieces[:-1]) == text
    assert len(pieces) == len(response) + 1
    assert not any("\ufffd" in piece for piece in pieces)
    # A response that breaks off in the middle of a letter hides nothing
    (emoji,) = (talk.encode(x) for x in ["😀"])
    assert "\ufffd" in "".join(token_texts(talk.tokenizer, prompt, emoji[:-1]))


class Page(HTMLParser):
    """The text of a piece of HTML, its tags, and each span's attributes."""

    def __init__(self, source):
        super().__init__()
        self.text, self.tags, self.spans = "", [], []
        self.feed(source)
        self.close()

    def handle_data(self, data):
        self.text += data

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.spans.append(dict(attributes))


PIECES = [" <b>", " &amp", "\x00", ' "it\'s"', "EOS"]
RATIOS = [1.0, -1.0, 0.5, -9.0, 0.0]


def test_shaded_tokens_are_escaped_and_coloured_by_their_sign_and_size():
    page = Page(shaded_html(PIECES, RATIOS))
    assert page.text == ' <b> &amp␀ "it\'s" EOS'
    assert page.tags == ["span"] * 6
    whole, *spans = page.spans
    assert [span["title"].split()[0] for span in spans] == [
        "+1.00",
        "-1.00",
        "+0.50",
        "-9.00",
        "+0.00",
    ]
    grounds = [span["style"] for span in spans]
    blue, red = "background:rgba(59, 111, 182, ", "background:rgba(200, 85, 61, "
    assert grounds == [
        blue + "0.30)",  # half of FULL_COLOUR, half of 0.6
        red + "0.30)",
        blue + "0.15)",
        red + "0.60)",  # no stronger than at FULL_COLOUR
        red + "0.00)",
    ]


def test_without_colours_the_numbers_stand_behind_the_tokens():
    shown = shaded_text([" so", " dull", "<i>", "EOS"], [0.04, -1.25, 0.05, 2])
    assert shown == " so dull[-1.2]<i>[+0.1] EOS[+2.0]"
    for shade in (shaded_html, shaded_text):
        with pytest.raises(ValueError, match="2 tokens need as many .*, got 1"):
            shade(["a", "b"], [0.0])


def test_a_card_escapes_everything_that_somebody_wrote():
    words = (["<script>alert(1)</script>"], [0.0], 0.0, 0.5, False)
    page = Page(card(Reply("<u>", "<img src=x onerror=alert(1)>", [1], *words)))
    assert set(page.tags) == {"p", "b", "br", "span"}
    assert "<img src=x onerror=alert(1)><script>" in page.text
    assert "reward +0.50" in page.text and page.text.endswith(" …")


def test_what_cannot_be_seen_is_shown():
    assert visible("a\x00b\nc\x7f\u202ed") == "a␀b␊c⟨U+007F⟩⟨U+202E⟩d"
    family = "👨\u200d👩"
    assert visible(f"é {family} 好") == f"é {family} 好"


def test_what_was_steered_is_a_mean_over_the_places():
    words = [[1, 2, 1], [2, 1, 3], [1, 2, 3]]
    ratios = [[1.0, 0.0, 2.0], [-3.0, 6.0, 8.0], [1.0, -3.0, 9.0]]
    replies = [
        Reply("", "", tokens, [], each, 0.0, 0.0, True)
        for tokens, each in zip(words, ratios, strict=True)
    ]
    assert steered(replies, least=3) == {2: -2.0, 1: 2.5}
    assert list(steered(replies, least=2)) == [2, 1, 3]
