"""The functions of notebook 5 that no other file has, and a person's way through it."""

import dataclasses
import shutil
from types import SimpleNamespace

import pytest
import torch

from tests.test_rollout import EOS, small_lm
from utils.data import load_tokenizer, pair_tokens
from utils.labelling import Labeller, describe
from utils.models import freeze, load_causal_lm
from utils.practice.exact_world import ExactWorld
from utils.preferences import read_pairs
from utils.settings import TINY
from utils.support.notebook import NOTEBOOKS, import_cells

LESSON = NOTEBOOKS["5"]


def test_log_probabilities_of_pairs_are_those_of_each_text_alone(world):
    """The sum over the response and its EOS: no prompt, no padding, no mean."""
    lm = load_causal_lm(str(world / "model")).eval()
    tokenizer = load_tokenizer(str(world / "model"))
    names = {"settings": TINY, "device": torch.device("cpu")}
    names |= {"eos_id": tokenizer.eos_token_id, "lesson3": None}
    five = SimpleNamespace(**import_cells(LESSON, "pair-logprobs", names=names))
    texts = [
        ("the plot", " is dull .", " is never dull , but the cast is lazy ."),
        ("from start to finish , the humor", " is witty .", " bores ."),
    ]
    pairs = [dict(zip(("prompt", "chosen", "rejected"), t, strict=True)) for t in texts]
    rows = [pair_tokens(pair, tokenizer, 66) for pair in pairs]
    with torch.no_grad():
        found = torch.stack(five.pair_logprobs(lm, rows), dim=1)
        for i, (prompt, *responses) in enumerate(rows):
            for j, response in enumerate(responses):
                ids = torch.tensor([prompt + response])
                logprobs = lm(ids).logits[0].log_softmax(dim=-1)
                places = range(len(prompt) - 1, ids.shape[1] - 1)
                alone = sum(logprobs[t, ids[0, t + 1]] for t in places)
                assert found[i, j].item() == pytest.approx(alone.item(), abs=1e-4)


class Letters:
    """A tokenizer to which each letter is a token; a is EOS."""

    eos_token, eos_token_id = "a", EOS

    def __call__(self, texts, **_):
        if isinstance(texts, list):
            return {"input_ids": [self(text)["input_ids"] for text in texts]}
        return {"input_ids": [ord(letter) - ord("a") for letter in texts]}


def dpo_loop():
    """The loop of DPO, for a very small model."""
    names = {"settings": TINY, "device": torch.device("cpu"), "eos_id": EOS}
    names |= {"lesson3": SimpleNamespace(reference=freeze(small_lm()))}
    names |= {"tokenizer": Letters()}
    return import_cells(LESSON, "pair-logprobs", "train-dpo", names=names)


@pytest.fixture(scope="module")
def loop():
    return dpo_loop()


def test_before_the_first_step_there_is_no_margin(loop):
    """Also for a model that comes in training mode, with dropout."""
    pairs = [
        {"prompt": "bc", "chosen": chosen, "rejected": rejected}
        for chosen, rejected in (("def", "e"), ("ghi", "jj"), ("d", "ib"))
    ]
    lm = small_lm().train()
    (first, *rest) = loop["train_dpo"](lm, pairs, beta=0.5, seed=0, epochs=3)
    implicit = first["chosen_reward"], first["rejected_reward"], first["margin"]
    assert implicit == pytest.approx((0, 0, 0), abs=1e-9), "dropout is on"
    assert rest[-1]["margin"] > 1e-4  # and then it learns


@pytest.fixture(scope="module")
def exact():
    return SimpleNamespace(**import_cells(LESSON, "exact-pairs", "exact-some-pairs"))


def test_dpo_on_all_pairs_finds_the_best_policy(exact):
    world = ExactWorld(seed=0)
    chosen, rejected, chances = exact.every_pair(world)
    assert len(chances) == 15 * 14 and chances.sum().item() == pytest.approx(1.0)
    lm = exact.train_exact_dpo(world, chosen, rejected, chances, 0.5)
    assert world.reached(lm, 0.5) > 0.995
    lm = exact.train_exact_dpo(world, rejected, chosen, chances, 0.5, steps=20)
    assert world.reached(lm, 0.5) < 0


def test_sampled_pairs_come_as_often_as_they_should(exact):
    """Counts of all 210 pairs against their chances: a chi-squared of about 209."""
    world, n = ExactWorld(seed=1), 40_000
    *pair, weights = exact.some_pairs(world, n, seed=0)
    assert len(weights) == n and weights.sum().item() == pytest.approx(1.0)
    *every, chances = exact.every_pair(world)
    counts = torch.zeros(15, 15).index_put_(
        tuple(pair), torch.ones(n), accumulate=True
    )[tuple(every)]
    squares = ((counts - n * chances) ** 2 / (n * chances)).sum().item()
    assert 209 - 5 * (2 * 209) ** 0.5 < squares < 209 + 5 * (2 * 209) ** 0.5


def test_whose_labels_must_be_one_of_three():
    names = {"PRESET": "tiny", "CHANGES": {}, "LABELS": "minee"}
    with pytest.raises(ValueError, match="simulated, mine or both, got 'minee'"):
        import_cells(LESSON, "settings", names=names)


def test_where_a_coin_decides_every_pair_there_is_no_share(capsys):
    """Few pairs, all of them of equal utility: nothing can be had above chance."""
    names = {"settings": TINY, "ceiling": 0.5, "test_utilities": torch.zeros(2, 2)}
    names |= {"train_pairs": [], "test_pairs": [], "both_texts": lambda pairs: []}
    names["train_on_pairs"] = lambda *_: (None, [{"loss": 0.7, "accuracy": 0.5}])
    names["score_texts"] = lambda *_: torch.tensor([1.0, 0.0, 2.0, 3.0])
    import_cells(LESSON, "reward-from-pairs", names=names)
    assert capsys.readouterr().out.endswith("new prompts 50.0%, ceiling 50.0%")


PARTS = {
    "before": "loop sample-pairs pairs questions utility label-few label-mine label",
    "after": "label-mine label-all split both-texts ceiling train-on-pairs "
    "reward-from-pairs ppo-on ppo pair-logprobs train-dpo dpo dpo-plot second table",
}
BRIEF = {"preference_pairs": 60, "preference_rollouts": 1, "ppo_rollout_size": 64}
BRIEF |= {"ppo_episodes": 64, "normalise_samples": 64, "eval_prompts": 32}


def test_a_person_labels_and_the_rest_learns_from_that_alone(series, tmp_path, capsys):
    """Forty answers, some of them skipped; by somebody who likes long texts."""
    folder, _ = series
    for artefact in ("sft", "reward_model"):
        shutil.copytree(folder / artefact, tmp_path / "tiny" / artefact)
    settings = dataclasses.replace(TINY, runs_dir=str(tmp_path), **BRIEF)
    names = {"settings": settings, "device": torch.device("cpu"), "LABELS": "mine"}
    five = import_cells(LESSON, *PARTS["before"].split(), names=names)
    path = tmp_path / "tiny" / "preferences" / "mine" / "pairs.jsonl"
    with pytest.raises(FileNotFoundError, match="no file .*mine.*; label some first"):
        import_cells(LESSON, "label-all", names=five)
    person = Labeller(five["questions"], path)
    while (q := person.question) and person.done < 40:
        longer = len(q.left) - len(q.right)
        person.answer("s" if not longer else "1" if longer > 0 else "2")
    theirs, _ = read_pairs(path)
    assert 30 <= len(theirs) <= 36 and person.report()["repeated"] >= 3

    capsys.readouterr()
    five = import_cells(LESSON, *PARTS["after"].split(), names=five)
    said = capsys.readouterr().out
    assert f"you: {describe(person.report())}" in said
    assert five["labelled"] == theirs  # nobody else's
    assert len(five["train_pairs"]) + len(five["test_pairs"]) == len(theirs)
    # what was kept back of them is what counts, not the simulated labeller's utility
    scores = five["scores"]
    guessed = (scores[:, 0] > scores[:, 1]).double().mean().item()
    assert five["ceiling"] == 1 and five["reached"] == pytest.approx(guessed)
    assert "PPO on the pairs" in said and "second round" not in said
