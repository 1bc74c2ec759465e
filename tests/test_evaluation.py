import dataclasses
import itertools
import math

import nbformat
import pytest
import torch

from tests.test_loop import CELLS
from tests.test_rollout import EOS, small_lm
from utils.data import load_tokenizer
from utils.evaluation import (
    FIGURES,
    best_of_n,
    best_possible,
    distinct_n,
    figures_table,
    gain_in_objective,
    interval_95,
    train_judge,
)
from utils.models import PolicyWithValueHead, RewardModel, freeze
from utils.practice.exact_world import ExactWorld
from utils.settings import TINY
from utils.support.notebook import ROOT, import_cells

SETTINGS = dataclasses.replace(TINY, max_new_tokens=6, ppo_minibatch_size=64)
PROMPTS = [[5, 6, 7, 8], [3], [4, 2]] * 20


class Tokenizer:
    """Token ids as words."""

    eos_token_id = EOS

    def decode(self, ids, skip_special_tokens=False):
        ids = [int(i) for i in ids]
        return " ".join(str(i) for i in ids if not (skip_special_tokens and i == EOS))


def source_of(cell_id):
    cells = nbformat.read(ROOT / "3-RLHF.ipynb", as_version=4).cells
    (source,) = (cell.source for cell in cells if cell.id == cell_id)
    return source


def evaluator(loop, source, settings=SETTINGS):
    """`evaluate` of notebook 3 for three small models, and these models."""
    torch.manual_seed(0)
    reward_model = freeze(RewardModel(small_lm(seed=2).base_model).double())
    lm, reference = small_lm(seed=0), small_lm(seed=1)

    def score(input_ids, attention_mask, mask):
        raw = reward_model(input_ids, attention_mask)
        return raw, raw / 2

    loop |= {
        "settings": settings,
        "device": torch.device("cpu"),
        "reference": reference,
        "score": score,
        "eos_id": EOS,
        "tokenizer": Tokenizer(),
        "held_out": PROMPTS,
        "judges": {"has_three": lambda texts: ["3" in t.split() for t in texts]},
    }
    exec(source, loop)
    policy = PolicyWithValueHead(lm).double()
    return lambda: loop["evaluate"](policy), (lm, reference, reward_model)


@pytest.fixture(scope="module")
def measured():
    def measure(settings=SETTINGS):
        loop = import_cells("3-RLHF.ipynb", *CELLS)
        evaluate, models = evaluator(loop, source_of("evaluate"), settings)
        return models, *evaluate()

    other = dataclasses.replace(SETTINGS, seed=SETTINGS.seed + 1)
    return *measure(), measure()[1:], measure(other)[1:]


def alone(model, ids):
    """Log-probability of each token after the first, from the model's own logits."""
    logprobs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return logprobs[range(len(ids) - 1), ids[1:]].detach()


def test_every_figure_from_the_texts_alone(measured):
    (lm, reference, reward_model), figures, rows, *_ = measured
    kls, rewards, surprise, n_tokens, ended = [], [], 0.0, 0, 0
    for row, prompt in zip(rows, PROMPTS, strict=True):
        assert row["prompt"] == " ".join(map(str, prompt))
        response = [int(i) for i in row["response"].split()]
        stopped = len(response) < SETTINGS.max_new_tokens
        ids = prompt + response + [EOS] * stopped
        n = len(response) + stopped
        policy, ref = alone(lm, ids)[-n:], alone(reference, ids)[-n:]
        kls.append((policy - ref).sum().item())
        surprise, n_tokens, ended = (
            surprise - ref.sum().item(),
            n_tokens + n,
            ended + stopped,
        )
        text = torch.tensor([ids])
        z = reward_model(text, torch.ones_like(text)).item()
        rewards.append(2 / (1 + math.exp(-z)) - 1)
        assert row["kl"] == pytest.approx(kls[-1], abs=1e-6)
        assert row["raw"] == pytest.approx(z, abs=1e-6)
        assert row["score"] == pytest.approx(z / 2, abs=1e-6)
        assert row["ended"] == stopped
        assert row["reward"] == pytest.approx(rewards[-1], abs=1e-6)
    count = len(PROMPTS)
    assert 0 < ended < count
    assert figures["kl"] == pytest.approx(sum(kls) / count, abs=1e-6)
    assert figures["reward"] == pytest.approx(sum(rewards) / count, abs=1e-6)
    assert figures["perplexity"] == pytest.approx(math.exp(surprise / n_tokens))
    assert figures["eos_rate"] == ended / count
    assert figures["length"] == n_tokens / count
    with_three = sum("3" in row["text"].split() for row in rows)
    assert figures["has_three"] == with_three / count


def test_the_same_model_gives_the_same_figures(measured):
    """Before and after are paired: same prompts, same seed."""
    _, figures, rows, again, other_seed = measured
    assert (figures, rows) == again
    assert rows != other_seed[1]


def test_each_row_belongs_to_its_prompt(loop=None, source=None):
    """In the order in which the prompts were given, so that rows can be paired."""
    loop = loop or import_cells("3-RLHF.ipynb", *CELLS)
    evaluate, _ = evaluator(loop, source or source_of("evaluate"))
    _, rows = evaluate()
    assert [row["prompt"] for row in rows] == [" ".join(map(str, p)) for p in PROMPTS]
    for row in rows:
        assert row["text"].startswith(row["prompt"])


def test_distinct_n_by_hand():
    rows = [[1, 2, 1, 2], [1, 2], [3]]
    assert distinct_n(rows, 1) == 3 / 7
    assert distinct_n(rows, 2) == 2 / 4  # (1, 2) three times, (2, 1) once


def test_the_judge_learns_words(world):
    tokenizer = load_tokenizer(str(world / "model"))
    sentences = ["a funny film", "a dull film", "the plot is funny", "the plot is dull"]
    judge = train_judge(sentences * 300, [1, 0, 1, 0] * 300, tokenizer, 0, epochs=5)
    assert judge(["a funny plot", "a dull plot"]) == [True, False]


def test_the_table_shows_what_was_measured():
    table = figures_table({"kl": 0.0}, {"kl": 2.345, "eos_rate": 0.5})
    lines = table.splitlines()
    assert len(lines) == 3 and "expected" not in table
    assert lines[1].split()[-2:] == ["0.00", "2.35"] or lines[1].split()[-1] == "2.34"
    assert lines[2].startswith(FIGURES["eos_rate"][0]) and lines[2].endswith("50.0%")


def test_the_best_possible_of_two_responses_by_hand():
    """One is better by beta log 3: it gets three quarters, and J* is beta log 2."""
    scores = torch.tensor([[0.0, 0.5 * math.log(3)], [1.0, 1.0]])
    weights, best = best_possible(scores, kl_coef=0.5)
    assert weights.tolist() == [pytest.approx([0.25, 0.75]), pytest.approx([0.5, 0.5])]
    kl = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    score = 0.75 * 0.5 * math.log(3)
    assert best["kl"] == pytest.approx(kl / 2)
    assert best["score"] == pytest.approx((score + 1) / 2)
    assert best["objective"] == pytest.approx((0.5 * math.log(2) + 1) / 2)


@pytest.mark.parametrize("kl_coef", [0.25, 0.5, 1.0])
def test_the_best_possible_is_that_of_the_exact_world(kl_coef):
    """From 100,000 responses, within four standard errors (of exp(R / beta)'s mean)."""
    world, n = ExactWorld(seed=7), 100_000
    ref = world.logprobs(world.reference).exp().detach()
    log_best, best_objective = world.optimum(kl_coef)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(ref, n, replacement=True, generator=generator)
    _, found = best_possible(world.scores[drawn][None], kl_coef)
    tilts = (world.scores.double() / kl_coef).exp()
    mean = (ref * tilts).sum()
    error = ((ref * (tilts - mean) ** 2).sum() / n).sqrt() / mean
    assert abs(found["objective"] - best_objective) < 4 * kl_coef * error
    best = log_best.detach().exp()
    exact = (best * world.scores).sum().item()
    assert found["score"] == pytest.approx(exact, abs=0.02)
    kl = (best * (log_best.detach() - ref.log())).sum().item()
    assert found["kl"] == pytest.approx(kl, abs=0.02)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_best_of_n_is_what_all_draws_of_n_give(n):
    """Each of the 15^n in the exact world, where eight responses score the same."""
    world = ExactWorld(seed=3)
    ref, scores = world.logprobs(world.reference).detach(), world.scores
    expected = torch.zeros(15, dtype=torch.float64)
    for drawn in itertools.product(range(15), repeat=n):
        # of equal ones the first: they come in any order
        best = max(drawn, key=lambda i: scores[i].item())
        expected[best] += ref[list(drawn)].sum().exp()
    found = best_of_n(ref, scores, n)
    torch.testing.assert_close(found.exp(), expected, atol=1e-12, rtol=0)
    # Of several prompts at once, each is as it is alone
    rows = best_of_n(torch.stack([ref, ref.flip(0)]), torch.stack([scores, -scores]), n)
    torch.testing.assert_close(rows[0], found)
    torch.testing.assert_close(rows[1], best_of_n(ref.flip(0), -scores, n))


def test_best_of_n_reaches_its_bound_where_no_response_is_likely():
    """log n - (n - 1) / n; and none of it where all score the same."""
    many, n = 300, 16
    log_ref = torch.full((many,), -math.log(many), dtype=torch.float64)
    found = best_of_n(log_ref, torch.arange(many), n)
    kl = (found.exp() * (found - log_ref)).sum().item()
    assert 0 < math.log(n) - (n - 1) / n - kl < 2e-4
    torch.testing.assert_close(best_of_n(log_ref, torch.zeros(many), n), log_ref)
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        best_of_n(log_ref, torch.arange(many), 0)


def test_the_share_is_0_for_the_reference_and_1_for_the_best():
    """By hand: two prompts, four responses each, and what they give at beta 0.5."""
    scores = torch.tensor([[0.0, 1.0, 2.0, -1.0], [0.5, 0.5, -0.5, 1.5]])
    mean = (0.5 + 0.5) / 2
    found = gain_in_objective(mean, 0.0, scores, 0.5)
    assert found == {"objective": mean, "share": 0}
    tilted = [[math.exp(2 * r) for r in row] for row in scores.tolist()]
    most = sum(0.5 * math.log(sum(row) / 4) for row in tilted) / 2
    # of the best policy, score and KL one by one
    score = kl = 0.0
    for row, weights in zip(scores.tolist(), tilted, strict=True):
        share = [w / sum(weights) for w in weights]
        score += sum(w * r for w, r in zip(share, row, strict=True)) / 2
        kl += sum(w * math.log(4 * w) for w in share) / 2
    found = gain_in_objective(score, kl, scores, 0.5)
    assert found["objective"] == pytest.approx(most, rel=1e-6)
    assert found["share"] == pytest.approx(1, rel=1e-6)
    halfway = gain_in_objective((mean + most) / 2 + 0.5 * 3, 3.0, scores, 0.5)
    assert halfway["share"] == pytest.approx(0.5, rel=1e-6)
    assert gain_in_objective(2.0, 9.0, scores, 0.0) == {"objective": 2.0}


def test_what_has_no_best_possible_is_refused():
    with pytest.raises(ValueError, match="kl_coef must be above 0, got 0"):
        best_possible(torch.zeros(2, 4), 0)
    for shape in ((4,), (4, 1)):
        with pytest.raises(ValueError, match="two responses at least, got"):
            best_possible(torch.zeros(shape), 0.1)


@pytest.mark.parametrize("n", range(2, 11))
def test_an_interval_leaves_out_a_fortieth_on_each_side(n):
    """Student's density, integrated up to the t that the half width stands for."""
    runs = torch.arange(n, dtype=torch.float64)
    middle, half = interval_95(runs)
    assert middle == (n - 1) / 2
    t = (half / runs.std() * n**0.5).item()
    nu, steps = n - 1, 20_000
    factor = math.gamma((nu + 1) / 2) / math.gamma(nu / 2) / math.sqrt(nu * math.pi)
    h = t / steps
    heights = [(1 + (i * h) ** 2 / nu) ** (-(nu + 1) / 2) for i in range(steps + 1)]
    inside = factor * h * (sum(heights) - (heights[0] + heights[-1]) / 2)
    # the table has three digits behind the point
    assert inside == pytest.approx(0.475, abs=2e-5)


def test_an_interval_is_that_of_each_figure_and_takes_two_runs():
    runs = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
    middle, half = interval_95(runs)
    assert middle.tolist() == [2, 5] and half[1] == 0
    assert half[0].item() == pytest.approx(12.706, abs=1e-3)  # s / sqrt(n) is 1
    for n in (1, 11):
        with pytest.raises(ValueError, match=f"2 to 10 runs, got {n}"):
            interval_95(torch.zeros(n))
