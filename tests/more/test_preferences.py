"""The file of pairs, broken, and what lesson 6 does with pairs.

The losses are held against those of `practice/checks`, with all their mistakes.
"""

import json
import math
import os

import pytest

from more.preferences import (
    append_pair,
    bradley_terry_loss,
    dpo_loss,
    pair_tokens,
    read_pairs,
    remove_pair,
)
from practice.cells import import_cells
from tests.conftest import refused
from tests.small import t
from utils.data import load_tokenizer
from utils.settings import NOTEBOOKS

PAIR = {"prompt": "the film is", "chosen": " fine .", "rejected": " dull ."}
TURNED = {**PAIR, "chosen": " dull .", "rejected": " fine ."}
ONE, TWO = t(-1.0), t(-1.0, -2.0)
SIX = import_cells(NOTEBOOKS["6"], "split-by-prompt", "both-texts")


def test_a_margin_of_any_size_stays_finite():
    for chosen, rejected, loss in (800, 0, 0), (0, 800, 800):
        leaves = [t(float(x)).requires_grad_() for x in (chosen, rejected)]
        found, stats = bradley_terry_loss(*leaves)
        found.backward()
        assert not any(x.requires_grad for x in stats.values())
        assert found.item() == loss and all(x.grad.isfinite().all() for x in leaves)


def test_dpo_by_default():
    """The sigmoid, beta 0.1, and no pair taken to be the wrong way round."""
    first = t(-1.0).requires_grad_()
    loss, stats = dpo_loss(first, t(-3.0), t(-4.0), t(-1.0))
    assert not any(x.requires_grad for x in stats.values())
    assert loss.item() == pytest.approx(math.log1p(math.exp(-0.1 * (3 + 2))))


def test_wrong_options_and_shapes_are_named():
    for options, says in (
        ({"beta": 0}, "beta must be above 0, got 0"),
        ({"label_smoothing": -0.1}, "from 0 to .* got -0.1"),
        ({"label_smoothing": 0.5}, "to below 0.5, .* got 0.5"),
        ({"kind": "hinge"}, "sigmoid or ipo, got 'hinge'"),
        ({"kind": "ipo", "label_smoothing": 0.1}, "got 0.1"),
    ):
        refused(says, dpo_loss, *[ONE] * 4, **options)
    refused(r"ref_rejected_logprobs \(2,\)", dpo_loss, *[ONE] * 3, TWO)
    refused(r"\(2,\).*\(1,\)", bradley_terry_loss, TWO, ONE)
    refused("a share of 0.1 of 1 promp", SIX["split_by_prompt"], [PAIR] * 9, 0.1, 0)
    refused("are the same text", append_pair, "x", {**PAIR, "chosen": " dull ."})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new folder" / "pairs.jsonl"


def test_pairs_are_read_as_they_were_written(path, monkeypatch):
    refused("no file .*pairs.*label some first", read_pairs, path)
    second = {"prompt": "тот фильм", "chosen": " “good”\n.", "rejected": " bad ."}
    for pair in (PAIR, {**second, "by": "me"}):
        append_pair(path, pair)
    assert read_pairs(path) == ([PAIR, second], [])
    assert len(path.read_text("utf8").splitlines()) == 2  # one line for each

    def check(pair):
        if pair == PAIR:
            raise ValueError("it is odd")

    assert read_pairs(path, check=check) == ([second], [f"{path}, line 1: it is odd"])

    def killed(*places):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)  # at the last moment
    for change in (append_pair, remove_pair):
        with pytest.raises(KeyboardInterrupt):
            change(path, second)
        assert read_pairs(path) == ([PAIR, second], [])


def test_lines_stay_whoever_wrote_them(path):
    """Without an end to the last one, with those of an old Mac, or cut off."""
    lines = [json.dumps({**PAIR, "chosen": f" {i} ."}).encode() for i in range(3)]
    path.parent.mkdir()
    for end in (b"\n", b"\r", b"\r\n"):
        path.write_bytes(end.join([*lines, b'{"prompt": "the \xc3']))
        append_pair(path, PAIR)
        pairs, (fault,) = read_pairs(path)
        assert [x["chosen"] for x in pairs] == [" 0 .", " 1 .", " 2 .", " fine ."]
        assert fault.startswith(f"{path}, line 4: ")
        append_pair(path, {**PAIR, "chosen": " last ."})
        before = path.read_bytes()
        remove_pair(path, PAIR)
        line = json.dumps(PAIR).encode() + b"\n"
        assert path.read_bytes() == before.replace(line, b"")
    refused("does not hold this answer any more", remove_pair, path, PAIR)


@pytest.mark.parametrize(
    "line, says",
    [
        (b"{not json", "Expecting property name"),
        (rb'{"prompt": "a", "chosen": "\ud83d", "rejected": "b"}', "surrogates"),
        (b'["a", "b", "c"]', "no object with prompt, chosen and rejected"),
        (json.dumps({**PAIR, "prompt": " "}).encode(), "there is no text 'prompt'"),
        (json.dumps(TURNED).encode(), "it prefers the text that"),
    ],
)
def test_a_broken_line_is_named_and_the_others_are_read(path, line, says):
    append_pair(path, PAIR)
    two = path.with_name("two.jsonl")
    two.write_bytes(b"\n".join([line, json.dumps(PAIR).encode(), b""]))
    pairs, (fault,) = read_pairs(path, two)
    assert pairs == [PAIR, PAIR]
    assert fault.startswith(f"{two}, line 1: ") and says in fault


def test_agreement_and_ceiling_by_hand():
    """Gaps -2, -1, 0 and 3; guessed right, wrong, left to a coin, and not at all."""
    utilities = t([0.0, 2.0], [0.0, 1.0], [1.0, 1.0], [3.0, 0.0])
    scores = t([4.0, 5.0], [1.0, 0.0], [0.0, 9.0], [2.0, 2.0])
    agreement, ceiling = SIX["agreement_with_labeller"](utilities, scores)
    s = [1 / (1 + math.exp(-x)) for x in (2.0, 1.0, 3.0)]
    assert agreement == pytest.approx((s[0] + (1 - s[1]) + 0.5 + 0.5) / 4)
    assert ceiling == pytest.approx((s[0] + s[1] + 0.5 + s[2]) / 4)


def test_the_split_shares_no_prompt():
    pairs = [{**PAIR, "prompt": f"film {i % 20}", "n": i} for i in range(100)]
    train, test = SIX["split_by_prompt"](pairs, 0.25, seed=1)
    assert len({pair["prompt"] for pair in test}) == 5 and len(test) == 25
    assert not {pair["prompt"] for pair in test} & {pair["prompt"] for pair in train}
    assert sorted(p["n"] for p in train + test) == list(range(100))
    assert SIX["split_by_prompt"](pairs, 0.25, seed=2)[1] != test


def test_a_pair_is_read_as_a_model_reads_it_or_named(world):
    tokenizer = load_tokenizer(str(world / "model"))

    def tokens(*texts):
        return pair_tokens(dict(zip(PAIR, texts, strict=True)), tokenizer, 20)

    rows = map(tokenizer.decode, tokens("the plot", " is fine .", " is"))
    assert [*rows] == ["the plot", " is fine .<|endoftext|>", " is<|endoftext|>"]
    refused("of prompt . rejected begins", tokens, "the pl", " is", "ot is dull")
    refused("chosen holds the EOS token", tokens, "the plot", " is<|endoftext|>", " is")
    says = "chosen have 21 tokens, more than 20"
    refused(says, tokens, "the plot", " is dull" * 9, " is")
