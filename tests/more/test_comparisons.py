"""The functions of notebook 6 that no other file has, and a person's way through it."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from more.labelling import Labeller
from more.preferences import pair_tokens, read_pairs
from practice.cells import import_cells
from practice.exact_world import ExactWorld
from utils.data import load_tokenizer
from utils.models import freeze, load_causal_lm
from utils.settings import NOTEBOOKS, TINY

LESSON = NOTEBOOKS["6"]
TEXTS = ("the plot", " is dull .", " is never dull , but the cast is lazy .")
TEXTS += ("from start to finish , the humor", " is witty .", " bores .")
NAMES = ("prompt", "chosen", "rejected")
PAIRS = [dict(zip(NAMES, TEXTS[i : i + 3], strict=True)) for i in (0, 3)]


@pytest.fixture(scope="module")
def dpo(world):
    """The loop of DPO, and what it takes from notebook 3."""
    name = str(world / "model")
    tokenizer, lesson3 = load_tokenizer(name), SimpleNamespace()
    lesson3.reference = freeze(load_causal_lm(name))
    names = {"settings": TINY, "device": torch.device("cpu"), "tokenizer": tokenizer}
    names |= {"eos_id": tokenizer.eos_token_id, "lesson3": lesson3, "name": name}
    found = import_cells(LESSON, "pair-logprobs", "train-dpo", names=names)
    return SimpleNamespace(**found)


def test_log_probabilities_of_pairs_are_those_of_each_text_alone(dpo):
    """The sum over the response and its EOS: no prompt, no padding, no mean."""
    lm = dpo.lesson3.reference
    rows = [pair_tokens(pair, dpo.tokenizer, 66) for pair in PAIRS]
    with torch.no_grad():
        found = torch.stack(dpo.pair_logprobs(lm, rows), dim=1)
        for i, (prompt, *responses) in enumerate(rows):
            for j, response in enumerate(responses):
                ids = torch.tensor([prompt + response])
                logprobs = lm(ids).logits[0].log_softmax(dim=-1)
                places = range(len(prompt) - 1, ids.shape[1] - 1)
                alone = sum(logprobs[t, ids[0, t + 1]] for t in places)
                assert found[i, j].item() == pytest.approx(alone.item(), abs=1e-4)


def test_before_the_first_step_there_is_no_margin(dpo):
    """Also for a model that comes in training mode, with dropout."""
    lm = load_causal_lm(dpo.name).train()
    watched = []
    options = {"beta": 0.5, "lr": 1e-3, "seed": 0, "epochs": 8, "size": 2}
    first, *rest = dpo.train_dpo(lm, PAIRS, **options, watch=watched.append)
    implicit = first["chosen_reward"], first["rejected_reward"], first["margin"]
    assert implicit == pytest.approx((0, 0, 0), abs=1e-6), "dropout is on"
    assert rest[-1]["margin"] > 0.1 and watched == [lm] * 4  # and then it learns


EXACT = SimpleNamespace(**import_cells(LESSON, "exact-pairs", "exact-some-pairs"))


def test_dpo_on_all_pairs_finds_the_best_policy():
    world = ExactWorld(seed=0)
    chosen, rejected, chances = EXACT.every_pair(world)
    assert len(chances) == 15 * 14 and chances.sum().item() == pytest.approx(1.0)
    lm = EXACT.train_exact_dpo(world, chosen, rejected, chances, 0.5)
    assert world.reached(lm, 0.5) > 0.995


def test_sampled_pairs_come_as_often_as_they_should():
    """Counts of all 210 pairs against their chances: a chi-squared of about 209."""
    world, n = ExactWorld(seed=1), 40_000
    chosen, rejected, weights = EXACT.some_pairs(world, n, seed=0)
    assert weights.tolist() == [1 / n] * n
    c, r, chances = EXACT.every_pair(world)
    counts = (15 * chosen + rejected).bincount(minlength=225)[15 * c + r]
    squares = ((counts - n * chances) ** 2 / (n * chances)).sum().item()
    assert abs(squares - 209) < 5 * (2 * 209) ** 0.5


BEFORE = "settings loop sample-pairs pairs questions utility label-few label-mine label"
AFTER = "label-mine label-all split-by-prompt split both-texts ceiling train-on-pairs"
AFTER += " reward-from-pairs ppo-on ppo pair-logprobs train-dpo dpo second table"
BRIEF = {"ppo_rollout_size": 64, "ppo_episodes": 64, "normalise_samples": 64}
BRIEF |= {"eval_prompts": 32}


@pytest.mark.slow  # the series first
def test_a_person_labels_and_the_rest_learns_from_that_alone(series, tmp_path):
    """Forty answers, some of them skipped; by somebody who likes long texts."""
    shutil.copytree(series[0], tmp_path / "tiny")
    changes = {"runs_dir": str(tmp_path), **BRIEF}
    names = {"PRESET": "tiny", "CHANGES": changes, "USE_DRIVE": False, "PAIRS": 60}
    names |= {"LABELS": "mine", "ROLLOUTS": 1, "DPO_LR": 3e-4, "DPO_BETA": 0.3}
    five = import_cells(LESSON, *BEFORE.split(), names=names)
    path = tmp_path / "tiny" / "preferences" / "mine" / "pairs.jsonl"
    person = Labeller(five["questions"], path)
    while (q := person.question) and person.done < 40:
        longer = len(q.left) - len(q.right)
        person.answer("s" if not longer else "1" if longer > 0 else "2")
    theirs, _ = read_pairs(path)
    assert 30 <= len(theirs) <= 36 and person.report()["repeated"] >= 3
    five = import_cells(LESSON, *AFTER.split(), names=five)
    assert five["labelled"] == theirs  # nobody else's
    assert len(five["train_pairs"]) + len(five["test_pairs"]) == len(theirs)
    # What was kept back of them is what counts, not the simulated labeller's utility
    scores = five["scores"]
    guessed = (scores[:, 0] > scores[:, 1]).double().mean().item()
    assert five["ceiling"] == 1 and five["reached"] == pytest.approx(guessed)
    assert five["after_ppo"] and five["after_dpo"] and not five["after_second"]
