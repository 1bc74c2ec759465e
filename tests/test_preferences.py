"""Bradley–Terry and DPO against numbers worked by hand; the file of pairs, broken."""

import json
import math

import pytest
import torch

from tests.test_ppo import t
from utils import preferences
from utils.practice.exact_world import ExactWorld

EXACT = {"atol": 1e-12, "rtol": 0}
PAIR = {"prompt": "the film is", "chosen": " fine .", "rejected": " dull ."}


def log_sigmoid(x):
    return -math.log(1 + math.exp(-x))


def test_bradley_terry_by_hand():
    loss, stats = preferences.bradley_terry_loss(t(2.0, 0.5, 1.0), t(1.0, 1.5, 1.0))
    by_hand = -(log_sigmoid(1.0) + log_sigmoid(-1.0) + log_sigmoid(0.0)) / 3
    torch.testing.assert_close(loss, t(by_hand)[0], **EXACT)
    assert stats["accuracy"].item() == pytest.approx(1 / 3)  # a tie is no win
    assert stats["margin"].item() == pytest.approx(0.0)


def test_only_differences_count():
    chosen, rejected = t(2.0, 0.5), t(1.0, 1.5)
    loss, _ = preferences.bradley_terry_loss(chosen, rejected)
    shifted, _ = preferences.bradley_terry_loss(chosen + 7, rejected + 7)
    torch.testing.assert_close(loss, shifted, **EXACT)


def test_a_margin_of_any_size_stays_finite():
    for chosen, rejected, expected in ((800.0, 0.0, 0.0), (0.0, 800.0, 800.0)):
        leaves = [torch.tensor([x], requires_grad=True) for x in (chosen, rejected)]
        loss, _ = preferences.bradley_terry_loss(*leaves)
        loss.backward()
        assert loss.item() == expected
        assert all(x.grad.isfinite().all() for x in leaves)


def test_dpo_by_hand():
    """Log-ratios 1 and -0.5, so D = 1.5; then 0 and 2, so D = -2."""
    arguments = (t(-3.0, -5.0), t(-4.5, -1.0), t(-4.0, -5.0), t(-4.0, -3.0))
    loss, stats = preferences.dpo_loss(*arguments, beta=0.4)
    by_hand = -(log_sigmoid(0.6) + log_sigmoid(-0.8)) / 2
    torch.testing.assert_close(loss, t(by_hand)[0], **EXACT)
    assert stats["chosen_reward"].item() == pytest.approx(0.4 * 0.5)
    assert stats["rejected_reward"].item() == pytest.approx(0.4 * 0.75)
    assert stats["margin"].item() == pytest.approx(0.4 * -0.25)
    assert stats["accuracy"].item() == 0.5
    loss, _ = preferences.dpo_loss(*arguments, beta=0.4, label_smoothing=0.1)
    turned = -(log_sigmoid(-0.6) + log_sigmoid(0.8)) / 2
    torch.testing.assert_close(loss, t(0.9 * by_hand + 0.1 * turned)[0], **EXACT)
    loss, _ = preferences.dpo_loss(*arguments, beta=0.4, kind="ipo")
    torch.testing.assert_close(loss, t((0.25**2 + 3.25**2) / 2)[0], **EXACT)


def test_at_the_reference_dpo_says_log_2_and_still_pulls():
    logprobs = [t(-3.0, -5.0).requires_grad_() for _ in range(2)]
    loss, stats = preferences.dpo_loss(*logprobs, *logprobs, beta=0.5)
    assert loss.item() == pytest.approx(math.log(2)) and stats["accuracy"] == 0
    loss.backward()
    torch.testing.assert_close(logprobs[0].grad, t(-0.125, -0.125), **EXACT)
    torch.testing.assert_close(logprobs[1].grad, t(0.125, 0.125), **EXACT)


@pytest.mark.parametrize("beta", [0.25, 0.5, 1.0])
def test_the_optimum_of_dpo_is_that_of_ppo(beta):
    """Its gradient is 0 there, on all pairs, each as often as Bradley and Terry say."""
    world = ExactWorld(seed=4)
    world.reference.double()
    scores, best = world.scores.double(), world.optimum(beta)[0].detach()
    ref = world.logprobs(world.reference).detach()
    c, r = torch.cartesian_prod(torch.arange(15), torch.arange(15)).t()
    chances = torch.sigmoid(scores[c] - scores[r]) / len(c)

    def slope(policy):
        policy = policy.clone().requires_grad_()
        texts = (policy[c], policy[r], ref[c], ref[r])
        pairs = zip(*(x.split(1) for x in texts), strict=True)
        losses = [preferences.dpo_loss(*pair, beta)[0] for pair in pairs]
        (gradient,) = torch.autograd.grad(torch.stack(losses) @ chances, policy)
        return gradient.abs().max()

    assert slope(best) < 1e-9 and slope(best + 0.1 * scores) > 1e-5


@pytest.mark.parametrize(
    "options, says",
    [
        ({"beta": 0.0}, "beta must be above 0, got 0.0"),
        ({"beta": math.nan}, "beta must be above 0, got nan"),
        ({"label_smoothing": 0.5}, "from 0 to below 0.5, got 0.5"),
        ({"label_smoothing": -0.1}, "from 0 to below 0.5, got -0.1"),
        ({"kind": "hinge"}, "sigmoid or ipo, got 'hinge'"),
        ({"kind": "ipo", "label_smoothing": 0.1}, "no label_smoothing, got 0.1"),
    ],
)
def test_wrong_options_are_named(options, says):
    with pytest.raises(ValueError, match=says):
        preferences.dpo_loss(*[t(-1.0)] * 4, **options)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(2,\).*\(1,\)"):
        preferences.bradley_terry_loss(t(1.0, 2.0), t(1.0))
    with pytest.raises(ValueError, match=r"ref_rejected_logprobs"):
        preferences.dpo_loss(t(1.0), t(1.0), t(1.0), t(1.0, 2.0))


def test_pairs_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "new folder" / "pairs.jsonl"
    second = {"prompt": "тот фильм", "chosen": " “good”\n.", "rejected": " bad ."}
    for pair in (PAIR, {**second, "by": "me"}):
        preferences.append_pair(path, pair)
    assert preferences.read_pairs(path) == ([PAIR, second], [])
    assert len(path.read_text("utf8").splitlines()) == 2  # one line for each


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_kill_costs_the_last_line_at_most(tmp_path, cut):
    path = tmp_path / "pairs.jsonl"
    preferences.append_pair(path, PAIR)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:cut])
    assert preferences.read_pairs(path) == ([PAIR], [])
    preferences.append_pair(path, {**PAIR, "chosen": " great ."})
    pairs, faults = preferences.read_pairs(path)
    assert [pair["chosen"] for pair in pairs] == [" fine .", " great ."] and not faults


@pytest.mark.parametrize(
    "line, says",
    [
        (b"{not json", "is no JSON"),
        (b"", "is no JSON"),
        (b'{"prompt": "\xff"}', "is no JSON"),
        (b'["a", "b", "c"]', "is no object"),
        (json.dumps({"prompt": "a", "chosen": "b"}).encode(), "has no text 'rejected'"),
        (json.dumps({**PAIR, "chosen": 3}).encode(), "has no text 'chosen'"),
        (json.dumps({**PAIR, "prompt": " "}).encode(), "has an empty 'prompt'"),
        (json.dumps({**PAIR, "rejected": " fine ."}).encode(), "same text as chosen"),
    ],
)
def test_a_broken_line_is_named_and_the_others_are_read(tmp_path, line, says):
    path = tmp_path / "pairs.jsonl"
    good = json.dumps(PAIR).encode()
    path.write_bytes(b"\n".join([good, line, good, b""]))
    pairs, (fault,) = preferences.read_pairs(path)
    assert pairs == [PAIR, PAIR]
    assert fault.startswith(f"{path}, line 2 ") and says in fault


def test_a_pair_that_says_nothing_is_not_written(tmp_path):
    path = tmp_path / "pairs.jsonl"
    with pytest.raises(ValueError, match="same text as chosen and as rejected"):
        preferences.append_pair(path, {**PAIR, "chosen": PAIR["rejected"]})
    assert not path.exists()


def test_files_are_read_together_and_what_contradicts_is_named(tmp_path):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    turned = {**PAIR, "chosen": PAIR["rejected"], "rejected": PAIR["chosen"]}
    other = {**PAIR, "prompt": "the plot is"}
    for path, pair in ((one, other), (one, PAIR), (two, other), (two, turned)):
        preferences.append_pair(path, pair)
    pairs, (fault,) = preferences.read_pairs(one, two)
    assert pairs == [other, PAIR, other]
    assert fault == f"{two}, line 2 prefers the text that {one}, line 2 rejects"


def test_a_check_of_the_readers_own_is_asked(tmp_path):
    path = tmp_path / "pairs.jsonl"
    for prompt in ("long enough", "x", "long, too"):
        preferences.append_pair(path, {**PAIR, "prompt": prompt})
    pairs, faults = preferences.read_pairs(
        path, check=lambda pair: "is short" if len(pair["prompt"]) < 2 else ""
    )
    assert [pair["prompt"] for pair in pairs] == ["long enough", "long, too"]
    assert faults == [f"{path}, line 2 is short"]


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file .*mine.*label some first"):
        preferences.read_pairs(tmp_path / "mine.jsonl")


def test_agreement_and_ceiling_by_hand():
    """Gaps 2, -1, 0 and 3; guessed right, wrong, left to a coin, and not at all."""
    utilities = t([2.0, 0.0], [0.0, 1.0], [1.0, 1.0], [3.0, 0.0])
    scores = t([5.0, 4.0], [1.0, 0.0], [0.0, 9.0], [2.0, 2.0])
    agreement, ceiling = preferences.agreement_with_labeller(utilities, scores)
    s = [1 / (1 + math.exp(-x)) for x in (2.0, 1.0, 3.0)]
    assert agreement == pytest.approx((s[0] + (1 - s[1]) + 0.5 + 0.5) / 4)
    assert ceiling == pytest.approx((s[0] + s[1] + 0.5 + s[2]) / 4)
    with pytest.raises(ValueError, match=r"\(4, 2\).*\(3, 2\)"):
        preferences.agreement_with_labeller(utilities, scores[:3])


def test_the_split_shares_no_prompt():
    pairs = [{**PAIR, "prompt": f"film {i % 20}", "n": i} for i in range(100)]
    train, test = preferences.split_by_prompt(pairs, 0.25, seed=1)
    prompts = [{pair["prompt"] for pair in part} for part in (train, test)]
    assert [len(p) for p in prompts] == [15, 5] and not prompts[0] & prompts[1]
    assert sorted(p["n"] for p in train + test) == list(range(100))
    assert [p["n"] for p in train] == sorted(p["n"] for p in train)
    assert preferences.split_by_prompt(pairs, 0.25, seed=2)[1] != test
    with pytest.raises(ValueError, match="a share of 0.01 of 20 prompts leaves"):
        preferences.split_by_prompt(pairs, 0.01)
