"""The tiny world is what it says: exact, hard enough, and never in two splits."""

import dataclasses
import math
import random
import threading
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from practice import tiny_world
from utils.data import clean, load_reviews, load_tokenizer
from utils.settings import FULL, TINY


@pytest.fixture(scope="module")
def dataset():
    return tiny_world.make_dataset()


def derive(symbol, rng):
    """A random derivation: its words, and the log-probability of its choices."""
    if symbol not in tiny_world.REVIEWS.rules:
        return [symbol], 0.0
    rules = tiny_world.REVIEWS.rules[symbol]
    p, expansion = rng.choices(rules, [p for p, _ in rules])[0]
    words, logprob = [], math.log(p)
    for part in expansion:
        more, q = derive(part, rng)
        words, logprob = words + more, logprob + q
    return words, logprob


def test_the_exact_probability_is_that_of_the_derivation():
    """Also shows that no text has two derivations or two sentiments."""
    rng = random.Random(0)
    for _ in range(1000):
        sign = rng.choice("+-")
        words, logprob = derive(f"Review{sign}", rng)
        verdict = tiny_world.judge(" ".join(words))
        expected = math.exp(logprob) / 2
        assert verdict.probability == pytest.approx(expected, rel=1e-9)
        assert verdict.positive == (sign == "+")


def test_the_entropy_is_the_mean_surprise():
    rng = random.Random(0)
    surprises = [
        math.log(2) - derive(f"Review{rng.choice('+-')}", rng)[1] for _ in range(20_000)
    ]
    mean = sum(surprises) / len(surprises)
    sd = math.sqrt(sum((s - mean) ** 2 for s in surprises) / len(surprises))
    assert abs(mean - tiny_world.ENTROPY) < 4 * sd / math.sqrt(len(surprises))


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
    assert tiny_world.least_loss(FULL, rows, tokenizer) == {}
    other = dataclasses.replace(TINY, model_name="gpt2")
    assert tiny_world.least_loss(other, rows, tokenizer) == {}
    texts[2] = "the plot is dull"  # cut off before its full stop
    assert tiny_world.least_loss(TINY, rows, tokenizer) == {}


@pytest.mark.parametrize(
    "text, positive",
    [
        ("never dull", True),
        ("not a funny film", False),
        ("funny but far too long", False),
        ("the plot is dull , but the acting is superb .", True),
        ("the acting is superb , but the plot is dull .", False),
    ],
)
def test_negation_and_contrast(text, positive):
    assert tiny_world.judge(text).grammatical
    assert tiny_world.judge(text).positive == positive


@pytest.mark.parametrize(
    "text",
    [
        "",
        "film a funny",
        "the plot is",
        "the plot is dull",
        "never  dull",
        "never dull ",
    ],
)
def test_what_the_grammar_cannot_write(text):
    assert not tiny_world.judge(text).grammatical


def test_the_vocabulary_is_large_enough():
    assert len(tiny_world.REVIEWS.words) >= 150


def test_no_phrase_stands_in_two_splits(dataset):
    splits = [{clean(s) for s in split["sentence"]} for split in dataset.values()]
    for i, a in enumerate(splits):
        for b in splits[i + 1 :]:
            assert not a & b


def test_the_columns_and_quirks_of_sst2(dataset):
    for name, split in dataset.items():
        assert split.column_names == ["idx", "sentence", "label"]
        assert split.features["label"].names == ["negative", "positive"]
        labels = set(split["label"])
        assert labels == ({-1} if name == "test" else {0, 1})
        assert all(s.endswith(" ") == (name != "test") for s in split["sentence"])


def test_the_labels_are_the_exact_sentiment(dataset):
    split = dataset["validation"]
    for sentence, label in zip(split["sentence"], split["label"], strict=True):
        assert tiny_world.judge(clean(sentence)).positive == bool(label)


def test_counting_words_is_not_enough(dataset):
    """The best linear classifier of word counts stays at or below 0.85."""
    train, held_out = dataset["train"], dataset["validation"]
    words = sorted({w for s in train["sentence"] for w in s.split()})
    column = {word: i for i, word in enumerate(words)}

    def counts(sentences):
        x = torch.zeros(len(sentences), len(words))
        for row, sentence in zip(x, sentences, strict=True):
            for word, n in Counter(sentence.split()).items():
                if word in column:
                    row[column[word]] = n
        return x

    x, y = counts(train["sentence"]), torch.tensor(list(train["label"])).float()
    linear = torch.nn.Linear(len(words), 1)
    optimizer = torch.optim.LBFGS(
        linear.parameters(), max_iter=100, line_search_fn="strong_wolfe"
    )
    loss = torch.nn.BCEWithLogitsLoss()

    def closure():
        optimizer.zero_grad()
        value = loss(linear(x).squeeze(1), y)
        value.backward()
        return value

    optimizer.step(closure)
    guess = linear(counts(held_out["sentence"])).squeeze(1) > 0
    accuracy = (guess == torch.tensor(list(held_out["label"])).bool()).float().mean()
    assert 0.6 < accuracy <= 0.85  # better than chance, so that it was trained at all


def test_the_tokenizer_loses_nothing(world, dataset):
    tokenizer = load_tokenizer(world / "model")
    for text in dataset["validation"]["sentence"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_folders_load_like_any_other(world, dataset):
    reviews = load_reviews(TINY)
    assert reviews["train"]["sentence"][:5] == dataset["train"]["sentence"][:5]
    assert reviews["validation"]["label"][:5] == dataset["validation"]["label"][:5]


@pytest.fixture
def quick_to_build(monkeypatch):
    monkeypatch.setitem(tiny_world.PRETRAINING, "steps", 1)
    monkeypatch.setattr(tiny_world, "ROWS", {"train": 20, "validation": 5, "test": 5})
    monkeypatch.setattr(tiny_world, "VOCABULARY", 300)


def test_it_is_built_once_and_again_when_its_definition_changes(
    tmp_path, monkeypatch, quick_to_build
):
    folder = tiny_world.build_world(tmp_path / "world", show_progress=False)
    weights = folder / "model" / "model.safetensors"
    first = weights.stat().st_mtime_ns
    tiny_world.build_world(folder, show_progress=False)
    assert weights.stat().st_mtime_ns == first
    monkeypatch.setattr(tiny_world, "definition", lambda: "another")
    tiny_world.build_world(folder, show_progress=False)
    assert weights.stat().st_mtime_ns != first
    assert not folder.with_name("world.unfinished").exists()


def test_of_two_at_once_the_second_waits_for_the_first(
    tmp_path, monkeypatch, quick_to_build
):
    folder, built, said, waits = tmp_path / "world", [], [], threading.Event()
    second = threading.Thread(target=tiny_world.build_world, args=[folder], daemon=True)
    pretrain = tiny_world.pretrain

    def hear(text):
        said.append(text)
        waits.set()

    def meanwhile(*args):
        built.append(args)
        second.start()
        assert waits.wait(timeout=60), "the second did not wait"
        return pretrain(*args)

    monkeypatch.setattr(tiny_world, "print", hear, raising=False)
    monkeypatch.setattr(tiny_world, "pretrain", meanwhile)
    tiny_world.build_world(folder, show_progress=False)
    second.join(timeout=60)
    assert not second.is_alive() and len(built) == len(said) == 1
    assert "another process builds the tiny world" in said[0]
    assert (folder / "model/model.safetensors").exists()
