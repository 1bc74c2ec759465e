"""The tiny world is what it says: exact, hard enough, and never in two splits."""

import dataclasses
import math
import random
import threading
from types import SimpleNamespace

import pytest

from practice import tiny_world
from utils.data import clean, load_tokenizer
from utils.evaluation import train_judge
from utils.settings import TINY


@pytest.fixture(scope="module")
def dataset():
    return tiny_world.make_dataset()


def derive(symbol, rng):
    """A random derivation: its words, and the log-probability of its choices."""
    if symbol not in tiny_world.REVIEWS.rules:
        return [symbol], 0.0
    rules = tiny_world.REVIEWS.rules[symbol]
    p, expansion = rng.choices(rules, [p for p, _ in rules])[0]
    parts = [derive(part, rng) for part in expansion]
    words = [word for some, _ in parts for word in some]
    return words, math.log(p) + sum(logprob for _, logprob in parts)


def test_the_exact_probability_is_that_of_the_derivation():
    """Also shows that no text has two derivations or two sentiments."""
    rng = random.Random(0)
    for sign in "+-" * 200:
        words, logprob = derive(f"Review{sign}", rng)
        verdict = tiny_world.judge(" ".join(words))
        expected = math.exp(logprob) / 2
        assert verdict.probability == pytest.approx(expected, rel=1e-9)
        assert verdict.positive == (sign == "+")


def test_the_least_loss_by_hand():
    """ "never" is the first word of 6/30 x 1/22 of the reviews, "the" of 17/30."""
    never = 6 / 30 / 22
    the = 8 / 30 * 6 / 15 / 12 * 4 / 6 * 6 / 16 / 20 / 2
    nats = -math.log(never / 20 / 2 / never) - math.log(the / (17 / 30))
    texts = {1: "never dull", 2: "the plot is dull ."}
    tokenizer = SimpleNamespace(decode=lambda ids: texts[ids[0]])
    rows = [[1, 0, 9], [2, 0, 0, 0, 0, 9]]  # a text of 2, and one of 5 words, and EOS
    found = tiny_world.least_loss(TINY, rows, tokenizer)
    assert found == {"the grammar": pytest.approx(nats / 7, rel=1e-9)}
    other = dataclasses.replace(TINY, model_name="gpt2")
    assert tiny_world.least_loss(other, rows, tokenizer) == {}
    texts[2] = "the plot is dull"  # cut off before its full stop
    assert tiny_world.least_loss(TINY, rows, tokenizer) == {}


VERDICTS = {  # whether a text is positive; None: the grammar cannot write it
    "never dull": True,
    "not a funny film": False,
    "funny but far too long": False,
    "the plot is dull , but the acting is superb .": True,
    "the acting is superb , but the plot is dull .": False,
} | dict.fromkeys(["", "film a funny", "the plot is", "never  dull", "never dull "])


def test_negation_contrast_and_what_the_grammar_cannot_write():
    for text, positive in VERDICTS.items():
        verdict = tiny_world.judge(text)
        assert verdict.grammatical == (positive is not None), text
        assert verdict.positive == bool(positive), text


def test_the_data_set_is_as_quirky_as_sst2_and_exact(dataset, world):
    """No text stands in two splits, and the tokenizer loses nothing."""
    splits = [{clean(s) for s in split["sentence"]} for split in dataset.values()]
    assert len(set.union(*splits)) == sum(map(len, splits))
    for name, split in dataset.items():
        assert split.column_names == ["idx", "sentence", "label"]
        assert split.features["label"].names == ["negative", "positive"]
        assert set(split["label"]) == ({-1} if name == "test" else {0, 1})
        assert all(s.endswith(" ") == (name != "test") for s in split["sentence"])
    tokenizer, split = load_tokenizer(world / "model"), dataset["validation"][:200]
    for sentence, label in zip(split["sentence"], split["label"], strict=True):
        assert tiny_world.judge(clean(sentence)).positive == bool(label)
        assert tokenizer.decode(tokenizer(sentence)["input_ids"]) == sentence


def test_counting_words_is_not_enough(dataset, world):
    train, held_out = dataset["train"][:8000], dataset["validation"]
    tokenizer = load_tokenizer(world / "model")
    judge = train_judge(train["sentence"], train["label"], tokenizer, seed=0)
    right = map(int.__eq__, judge(held_out["sentence"]), held_out["label"])
    assert 0.6 < sum(right) / len(held_out) <= 0.85  # better than chance: it was taught


def test_it_is_built_once_and_again_when_its_definition_changes(tmp_path, monkeypatch):
    """Also by two at once: the second waits for the first."""
    monkeypatch.setitem(tiny_world.PRETRAINING, "steps", 1)
    monkeypatch.setattr(tiny_world, "ROWS", {"train": 20, "validation": 5, "test": 5})
    monkeypatch.setattr(tiny_world, "VOCABULARY", 300)
    folder, built, pretrain = tmp_path / "world", [], tiny_world.pretrain
    second = threading.Thread(target=tiny_world.build_world, args=[folder], daemon=True)

    def meanwhile(*args):
        built.append(args)
        if len(built) == 1:
            second.start()
            second.join(timeout=1)
            assert second.is_alive(), "the second did not wait"
        return pretrain(*args)

    monkeypatch.setattr(tiny_world, "pretrain", meanwhile)
    tiny_world.build_world(folder)
    second.join(timeout=60)
    assert not second.is_alive() and len(built) == 1
    tiny_world.build_world(folder)
    assert len(built) == 1
    (folder / "definition.txt").write_text("another")
    tiny_world.build_world(folder)
    assert len(built) == 2 and not folder.with_name("world.unfinished").exists()
