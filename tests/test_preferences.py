"""The file of pairs, broken, and what is done with pairs.

The losses are held against those of `practice/checks`, with all their mistakes.
"""

import json
import math

import pytest

from more.preferences import (
    agreement_with_labeller,
    append_pair,
    bradley_terry_loss,
    dpo_loss,
    pair_check,
    pair_tokens,
    read_pairs,
    split_by_prompt,
)
from tests.small import t
from utils.data import load_tokenizer

PAIR = {"prompt": "the film is", "chosen": " fine .", "rejected": " dull ."}
TURNED = {**PAIR, "chosen": " dull .", "rejected": " fine ."}


@pytest.mark.parametrize("chosen, rejected, says", [(800, 0, 0), (0, 800, 800)])
def test_a_margin_of_any_size_stays_finite(chosen, rejected, says):
    leaves = [t(float(x)).requires_grad_() for x in (chosen, rejected)]
    loss, _ = bradley_terry_loss(*leaves)
    loss.backward()
    assert loss.item() == says and all(x.grad.isfinite().all() for x in leaves)


ONE, TWO = t(-1.0), t(-1.0, -2.0)


@pytest.mark.parametrize(
    "function, arguments, options, says",
    [
        (dpo_loss, [ONE] * 4, {"beta": math.nan}, "beta must be above 0, got nan"),
        (dpo_loss, [ONE] * 4, {"label_smoothing": 0.5}, "from 0 to below 0.5, got 0.5"),
        (dpo_loss, [ONE] * 4, {"kind": "hinge"}, "sigmoid or ipo, got 'hinge'"),
        (dpo_loss, [ONE] * 4, {"kind": "ipo", "label_smoothing": 0.1}, "got 0.1"),
        (dpo_loss, [ONE] * 3 + [TWO], {}, "ref_rejected_logprobs"),
        (bradley_terry_loss, [TWO, ONE], {}, r"\(2,\).*\(1,\)"),
        (agreement_with_labeller, [TWO, ONE], {}, r"\(2,\).*\(1,\)"),
    ],
)
def test_wrong_options_and_shapes_are_named(function, arguments, options, says):
    with pytest.raises(ValueError, match=says):
        function(*arguments, **options)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new folder" / "pairs.jsonl"


def test_pairs_are_read_as_they_were_written(path):
    second = {"prompt": "тот фильм", "chosen": " “good”\n.", "rejected": " bad ."}
    for pair in (PAIR, {**second, "by": "me"}):
        append_pair(path, pair)
    assert read_pairs(path) == ([PAIR, second], [])
    assert len(path.read_text("utf8").splitlines()) == 2  # one line for each
    short = read_pairs(path, check=lambda pair: "is odd" if pair == PAIR else "")
    assert short == ([second], [f"{path}, line 1 is odd"])


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_kill_costs_the_last_line_at_most(path, cut):
    append_pair(path, PAIR)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:cut])
    assert read_pairs(path) == ([PAIR], [])
    append_pair(path, {**PAIR, "chosen": " great ."})
    pairs, faults = read_pairs(path)
    assert [pair["chosen"] for pair in pairs] == [" fine .", " great ."] and not faults


@pytest.mark.parametrize(
    "line, says",
    [
        (b"{not json", "is no JSON"),
        (b'{"prompt": "\xff"}', "is no JSON"),
        (b'["a", "b", "c"]', "is no object"),
        (json.dumps({"prompt": "a", "chosen": "b"}).encode(), "has no text 'rejected'"),
        (json.dumps({**PAIR, "chosen": 3}).encode(), "has no text 'chosen'"),
        (json.dumps({**PAIR, "prompt": " "}).encode(), "has an empty 'prompt'"),
        (json.dumps({**PAIR, "rejected": " fine ."}).encode(), "same text as chosen"),
        (json.dumps(TURNED).encode(), "prefers the text that"),
    ],
)
def test_a_broken_line_is_named_and_the_others_are_read(path, line, says):
    append_pair(path, PAIR)
    two = path.with_name("two.jsonl")
    two.write_bytes(b"\n".join([line, json.dumps(PAIR).encode(), b""]))
    pairs, (fault,) = read_pairs(path, two)
    assert pairs == [PAIR, PAIR]
    assert fault.startswith(f"{two}, line 1 ") and says in fault


def test_what_cannot_be_written_or_read_is_named(path):
    with pytest.raises(ValueError, match="same text as chosen and as rejected"):
        append_pair(path, {**PAIR, "chosen": PAIR["rejected"]})
    with pytest.raises(FileNotFoundError, match="no file .*pairs.*label some first"):
        read_pairs(path)


def test_agreement_and_ceiling_by_hand():
    """Gaps -2, -1, 0 and 3; guessed right, wrong, left to a coin, and not at all."""
    utilities = t([0.0, 2.0], [0.0, 1.0], [1.0, 1.0], [3.0, 0.0])
    scores = t([4.0, 5.0], [1.0, 0.0], [0.0, 9.0], [2.0, 2.0])
    agreement, ceiling = agreement_with_labeller(utilities, scores)
    s = [1 / (1 + math.exp(-x)) for x in (2.0, 1.0, 3.0)]
    assert agreement == pytest.approx((s[0] + (1 - s[1]) + 0.5 + 0.5) / 4)
    assert ceiling == pytest.approx((s[0] + s[1] + 0.5 + s[2]) / 4)


def test_the_split_shares_no_prompt():
    pairs = [{**PAIR, "prompt": f"film {i % 20}", "n": i} for i in range(100)]
    train, test = split_by_prompt(pairs, 0.25, seed=1)
    assert len({pair["prompt"] for pair in test}) == 5 and len(test) == 25
    assert not {pair["prompt"] for pair in test} & {pair["prompt"] for pair in train}
    assert sorted(p["n"] for p in train + test) == list(range(100))
    assert split_by_prompt(pairs, 0.25, seed=2)[1] != test
    with pytest.raises(ValueError, match="a share of 0.01 of 20 prompts leaves"):
        split_by_prompt(pairs, 0.01)


@pytest.fixture(scope="module")
def tokenizer(world):
    return load_tokenizer(str(world / "model"))


def test_a_pair_as_a_model_reads_it(tokenizer):
    found = [tokenizer.decode(row) for row in pair_tokens(PAIR, tokenizer, 9)]
    assert found == ["the film is", " fine .<|endoftext|>", " dull .<|endoftext|>"]


@pytest.mark.parametrize(
    "texts, says",
    [
        (("the pl", "ot is fine .", " is"), "cut within a token of prompt + chosen"),
        (("the pl", " is", "ot is dull"), "within a token of prompt + rejected"),
        (("the plot", " is<|endoftext|>", " is"), "the EOS token '<|endoftext|>' in"),
        (("the plot", " is dull" * 9, " is"), "has 21 tokens in prompt + chosen, more"),
        (("the plot", " is fine .", " is"), ""),
    ],
)
def test_a_pair_that_would_be_read_otherwise_is_named(tokenizer, texts, says):
    found = pair_check(tokenizer, 20)(dict(zip(PAIR, texts, strict=True)))
    assert says in found and bool(says) == bool(found)
