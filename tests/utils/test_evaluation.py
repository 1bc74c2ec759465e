"""What is measured before and after, and what it is held against."""

import dataclasses
import math
from types import SimpleNamespace

import matplotlib
import pytest
import torch

from practice.cells import import_cells
from tests.small import EOS, small_lm, small_tokenizer
from utils.evaluation import FIGURES, distinct_n, expected, figures_table
from utils.models import PolicyWithValueHead, RewardModel, freeze
from utils.settings import FULL, TINY

matplotlib.use("agg")
SETTINGS = dataclasses.replace(TINY, max_new_tokens=6, model_name="x")
PROMPTS, TOKENIZER = [[5, 6, 7, 8], [3], [4, 2]] * 20, small_tokenizer()
MODELS = (PolicyWithValueHead(small_lm(seed=0)).double(), small_lm(seed=1))
REWARD_MODEL = freeze(RewardModel(small_lm(seed=2).base_model).double())


def measuring(seed=42):
    """The cell that measures, for three small models; c is praise, d is blame."""

    def score(input_ids, attention_mask, mask):
        raw = REWARD_MODEL(input_ids, attention_mask)
        return raw, raw / 2

    labels, texts = {"label": [True, False] * 99}, ["c", "d"] * 99
    names = {"settings": dataclasses.replace(SETTINGS, seed=seed), "seed": seed}
    names |= {"device": torch.device("cpu"), "reference": MODELS[1], "score": score}
    names |= {"eos_id": EOS, "tokenizer": TOKENIZER, "held_out": PROMPTS}
    names |= {"train_sentences": texts, "unseen": texts}
    names |= {"reviews": {"train": labels, "validation": labels}}
    return import_cells(
        "3-RLHF.ipynb", "collect-rollout", "judges", "evaluate", names=names
    )


def alone(lm, ids, n):
    logprobs = lm(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return logprobs[range(len(ids) - 1), ids[1:]][-n:].sum().item()


def test_every_figure_from_the_texts_alone(capsys):
    """In the order of the prompts, so that before and after are paired."""
    (policy, reference), cells, found = MODELS, measuring(), []
    assert "right on 100.0% of held-out reviews" in capsys.readouterr().out
    figures, rows = cells["evaluate"](policy)
    for row, prompt in zip(rows, PROMPTS, strict=True):
        assert row["prompt"] == TOKENIZER.decode(prompt)
        response = TOKENIZER(row["response"])["input_ids"] if row["response"] else []
        ended = len(response) < SETTINGS.max_new_tokens
        ids, n = prompt + response + [EOS] * ended, len(response) + ended
        ref, text = alone(reference, ids, n), torch.tensor([ids])
        z = REWARD_MODEL(text, torch.ones_like(text)).item()
        known = {"raw": z, "reward": 2 / (1 + math.exp(-z)) - 1, "score": z / 2}
        known |= {"kl": alone(policy.lm, ids, n) - ref, "ended": float(ended)}
        assert {k: row[k] for k in known} == pytest.approx(known, abs=1e-6)
        (judged,) = cells["judge"]([f"{row['text']} EOS"])  # as a policy may spell it
        found.append(known | {"ref": ref, "n": n, "judged": judged})
    mean = {k: sum(row[k] for row in found) / len(found) for k in found[0]}
    known = {k: mean[k] for k in ("reward", "score", "kl")}
    known |= {"eos_rate": mean["ended"], "length": mean["n"]}
    known |= {"perplexity": math.exp(-mean["ref"] / mean["n"])}
    known |= {"judged_positive": mean["judged"]}
    assert 0 < mean["ended"] < 1 and 0 < mean["judged"] < 1
    assert {k: figures[k] for k in known} == pytest.approx(known, abs=1e-6)
    assert cells["evaluate"](policy) == (figures, rows)  # the same seed
    assert measuring(seed=43)["evaluate"](policy)[1] != rows


def test_several_responses_stand_in_their_prompts_rows():
    """Also where they are collected in several rollouts, here of four."""

    def collect(writer, other, score, prompts, *rest):
        seen.append([p[0] for p in prompts])
        ids = torch.tensor(seen[-1]).double()
        old = ids[:, None].expand(-1, 2)
        return SimpleNamespace(scores=ids, old_logprobs=old, ref_logprobs=old * other)

    cells, seen = measuring(), []
    cells |= {"collect_rollout": collect, "settings": SimpleNamespace(seed=0)}
    cells["settings"].ppo_rollout_size = 4
    scores, log_ratios = cells["sample_scores"](None, 0.5, [[5, 6], [3], [4, 2]], 2)
    assert seen == [[5, 5, 3, 3], [4, 4]]
    assert scores.tolist() == log_ratios.tolist() == [[5, 5], [3, 3], [4, 4]]


def test_distinct_words_by_hand():
    rows = [[1, 2, 1, 2], [1, 2], [3]]  # (1, 2) three times, (2, 1) once
    assert (distinct_n(rows, 1), distinct_n(rows, 2)) == (3 / 7, 2 / 4)


def measured(sft, policy, beta):
    """What the cell `after` makes of these (score, log-ratio) of each model."""
    figures, run = {"score": 2.0, "kl": 9.0}, SimpleNamespace(policy=MODELS[0])
    names = {"settings": dataclasses.replace(SETTINGS, kl_coef=beta), "run": run}
    names |= {"evaluate": lambda policy: (dict(figures), []), "held_out": PROMPTS[:2]}
    samples = {"sft": torch.tensor(sft).double(), MODELS[0]: torch.tensor(policy)}
    names |= {"sft_policy": "sft", "reference": "reference"}

    def sample_scores(writer, other, prompts, n):
        assert other == {"sft": MODELS[0].lm, MODELS[0]: "reference"}[writer]
        scores, ratios = samples[writer].T
        return scores.expand(2, -1), ratios.double().expand(2, -1)

    cells = import_cells("3-RLHF.ipynb", "after", names=names | locals())
    assert cells["after"]["objective"] == pytest.approx(2 - 9 * beta)
    return cells


def test_the_share_of_the_best_possible_of_two_responses_by_hand():
    """Equally likely, one better by beta log 3: pi* is 1/4, 3/4, and J* beta log 2."""
    beta, better = 0.5, 0.5 * math.log(3)
    cells = measured([(0, 0), (better, 0)], [(0, 0), (better, 0)], beta)
    known = {"J_best": beta * math.log(2), "J_ref": better / 2, "J": better / 2}
    known |= {"missing": math.log(4 / 3) / 2}  # the KL of 1/2, 1/2 to pi*
    assert {k: cells[k].tolist() for k in known} == {
        k: pytest.approx([x, x]) for k, x in known.items()
    }
    assert cells["after"]["share"] == pytest.approx(0)
    worse, more = (0, math.log(1 / 2)), (better, math.log(3 / 2))
    sft = [(score, -ratio) for score, ratio in (worse, worse, more, more)]
    cells = measured(sft, [worse, more, more, more], beta)  # the policy is pi*
    assert cells["J_best"].tolist() == pytest.approx([beta * math.log(2)] * 2)
    assert cells["after"]["share"] == pytest.approx(1)
    each = [(4 / 3 if score == 0 else 12 / 5) / 16 for score, _ in sft]  # of 16 in all
    assert cells["weights"][0, :4].tolist() == pytest.approx(each)
    assert "share" not in measured(sft, [worse], 0.0)["after"]  # no price, no best


def test_what_is_expected_is_that_of_the_preset(monkeypatch):
    for gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        found = expected(dataclasses.replace(TINY, seed=7, train_anyway=True))
        assert found == {} if gpu else set(FIGURES) <= set(found)
        assert expected(dataclasses.replace(TINY, kl_coef=0.2)) == expected(FULL) == {}


OUTSIDE = [(2.9, 1.0, []), (3.1, 1.0, ["kl"]), (0.9, 1.0, ["kl"])]
# one response of 256 without EOS is no news, two are
OUTSIDE += [(2.0, 255 / 256, []), (2.0, 254 / 256, ["eos_rate"])]


@pytest.mark.parametrize("kl, eos_rate, outside", OUTSIDE)
def test_the_table_shows_what_was_measured_and_what_lies_outside(kl, eos_rate, outside):
    before, after = {"kl": 0.0, "unknown": 2.0}, {"kl": kl, "eos_rate": eos_rate}
    head, first, second = figures_table(before, after).splitlines()
    assert "expected" not in head and first.startswith(FIGURES["kl"][0])
    assert first.split()[-2:] == ["0.00", f"{kl:.2f}"]
    assert second.split()[-1] == f"{eos_rate:.1%}"
    table = figures_table({}, after, {"kl": (2.0, 0.25), "eos_rate": (1.0, 0.0)})
    lines = dict(zip(("kl", "eos_rate"), table.splitlines()[1:], strict=True))
    assert "2.00 ± 1.00" in lines["kl"]
    assert [k for k, line in lines.items() if line.endswith("outside")] == outside
