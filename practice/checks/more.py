"""Checks of what `more/` teaches: estimators, losses on pairs, adapters."""

import functools
from statistics import pstdev, stdev, variance

import torch
from torch import nn
from torch.nn.functional import logsigmoid
from transformers.pytorch_utils import Conv1D  # GPT-2's layer; its weight is (in, out)

from practice.checks.comparison import check
from practice.checks.models import logprobs_of
from practice.checks.ppo import k3


def _advantages(
    scores, k, without=0, lost=0, base=1, spread=None, sign=1,
    rows=lambda places, k: places.view(-1, k),
):  # fmt: skip
    """Each score less a mean of its group, by the group's spread, one at a time.

    `without`: its own score is not in the sum, which is divided by k - `lost`.
    """
    found = torch.zeros_like(scores)
    for row in rows(torch.arange(len(scores)), k):
        group = scores[row].tolist()
        by = spread(group) + 1e-4 if spread else 1
        for i, own in zip(row, group, strict=True):
            mean = (sum(group) - without * own) / (len(group) - lost)
            found[i] = sign * (own - base * mean) / by
    return found


_rloo = functools.partial(_advantages, without=1, lost=1)
_grpo = functools.partial(_advantages, spread=stdev)
OF_GROUPS = {
    "the groups go across the prompts, as if these came round and round":
        {"rows": lambda places, k: places.view(k, -1).t()},
    "all responses are one group, whatever their prompt":
        {"rows": lambda places, k: places.view(1, -1)},
    "the sign is turned: worse responses become likelier": {"sign": -1},
}  # fmt: skip
RLOO = {
    "the baseline is the mean of all k, its own score among them":
        {"without": 0, "lost": 0},
    "there is no baseline": {"base": 0},
    "it is divided by the spread of the group, as in GRPO": {"spread": stdev},
    "the sum of the others is divided by k, not by k - 1": {"lost": 0},
    **OF_GROUPS,
}  # fmt: skip
GRPO = {
    "it is not divided by the spread of the group": {"spread": None},
    "the spread is that of the whole batch, not of the group":
        lambda scores, k: _grpo(scores, k, spread=lambda group: scores.std()),
    "the variance is divided by k, not by k - 1": {"spread": pstdev},
    "the divisor is the variance, not its root": {"spread": variance},
    "the baseline is the mean of the others, as in RLOO": {"without": 1, "lost": 1},
    **OF_GROUPS,
}  # fmt: skip


def _groups(case):
    """Scores of 4 responses to each of 3 prompts, each prompt with its own level."""
    spreads = torch.tensor([[0.5], [1.0], [2.0]])
    return (3 * case.normal(3, 1) + spreads * case.normal(3, 4)).flatten(), 4


@check(_rloo, RLOO, "advantages")
def check_rloo_advantages(case):
    """`rloo_advantages(scores, group_size)` -> (B,)."""
    return _groups(case)


@check(_grpo, GRPO, "advantages")
def check_grpo_advantages(case):
    """`grpo_advantages(scores, group_size)` -> (B,), divided by the group's spread."""
    return _groups(case)


def _loss(
    new, old, ref, A, mask, clip, beta, mean, kl=k3, pick=torch.maximum, slots=False
):
    """GRPO's loss, response by response; the rest says what a mistake changes."""
    total, lengths = 0.0, mask.sum(dim=1)
    for b, n in enumerate(lengths.tolist()):
        ratio = torch.exp(new[b, :n] - old[b, :n])
        each = pick(-A[b] * ratio, -A[b] * ratio.clamp(1 - clip, 1 + clip))
        each = each + beta * kl(new[b, :n] - ref[b, :n])
        over = n * len(mask) if mean == "response" else lengths.sum()
        total = total + each.sum() / (mask.numel() if slots else over)
    return total


LOSS = {
    "the KL has the wrong sign: it is paid for, not charged": {"kl": lambda x: -k3(x)},
    "the KL is counted twice": {"kl": lambda x: 2 * k3(x)},
    "the KL is left out": {"beta": 0},
    "k3 takes the log-ratio reversed": {"kl": lambda x: k3(-x)},
    "k1 stands for k3: its gradient is 0 on average": {"kl": torch.clone},
    "min stands for max": {"pick": torch.minimum},
    "each token weighs the same, also with mean by response": {"mean": "token"},
    "each response weighs the same, also with mean by token": {"mean": "response"},
    "the sum is divided by all slots, padding too": {"slots": True},
}


@check(_loss, LOSS, "loss", "gradient", leaves=1)
def check_grpo_loss(case):
    """`grpo_loss(logprobs, old, ref, advantages, mask, clip_range, kl_coef, mean)`."""
    numbers = case.uniform(0.1, 0.3), case.uniform(0.2, 0.6)
    old, ref = -1 - case.normal().abs(), -1 - case.normal().abs()
    new, advantages = old + 0.3 * case.normal(), case.normal(len(case.mask))
    # In the longest response: far up and far down
    new[1, :2] = old[1, :2] + case.uniform(0.5, 0.7) * torch.tensor([1.0, -1.0])
    given = (new, old, ref, advantages, case.mask, *numbers)
    return {f" by {mean}": (*given, mean) for mean in ("response", "token")}


def _bradley_terry(
    chosen, rejected, turn=1, each=logsigmoid, over=torch.mean, wins=torch.gt
):
    loss = -over(each(turn * (chosen - rejected)))
    accuracy = wins(chosen, rejected).double().mean()
    return loss, {"accuracy": accuracy, "margin": (chosen - rejected).mean()}


BRADLEY_TERRY = {
    "chosen and rejected are swapped": {"turn": -1},
    "the loss is a sum over the pairs, not a mean": {"over": torch.sum},
    "the sigmoid has no logarithm": {"each": torch.sigmoid},
    "the difference itself is the loss, without a sigmoid": {"each": torch.clone},
    "a tie counts as a win": {"wins": torch.ge},
}


@check(_bradley_terry, BRADLEY_TERRY, "loss", "gradient", "stats", leaves=2)
def check_bradley_terry_loss(case):
    """`bradley_terry_loss(chosen_scores, rejected_scores)` -> loss, stats."""
    chosen, rejected = case.normal(7), case.normal(7)
    rejected[3] = chosen[3]  # a tie
    return chosen, rejected


def _dpo(
    chosen, rejected, ref_chosen, ref_rejected, beta, smoothing, kind, turn=1, ref=1,
    inside=1, outside=0, fixed=torch.detach, over=torch.mean, ipo=0, target=2,
):  # fmt: skip
    """Both kinds; the rest says what a mistake changes. The statistics stay right.

    `inside`, `outside`, `ipo`: the power of beta in the sigmoid, before it, and as a
    factor of IPO's difference.
    """
    ratios = [chosen - ref_chosen, rejected - ref_rejected]
    stats = {
        "chosen_reward": beta * ratios[0].mean(),
        "rejected_reward": beta * ratios[1].mean(),
        "accuracy": (ratios[0] > ratios[1]).double().mean(),
    }
    D = turn * (chosen - rejected - ref * fixed(ref_chosen - ref_rejected))
    if kind == "ipo":
        return over((beta**ipo * D - 1 / (target * beta)) ** 2), stats
    D = beta**inside * D
    each = (1 - smoothing) * logsigmoid(D) + smoothing * logsigmoid(-D)
    return -(beta**outside) * over(each), stats


DPO = {
    "chosen and rejected are swapped": {"turn": -1},
    "the reference is left out": {"ref": 0},
    "the reference has the wrong sign": {"ref": -1},
    "beta stands outside of the sigmoid": {"inside": 0, "outside": 1},
    "beta is left out": {"inside": 0},
    "the labels are not smoothed": {"smoothing": 0},
    "gradients reach the reference": {"fixed": torch.clone},
    "the loss is a sum over the pairs, not a mean": {"over": torch.sum},
    "IPO's difference is multiplied by beta": {"ipo": 1},
    "IPO's target is 1 / beta, not half of it": {"target": 1},
}


@check(_dpo, DPO, "loss", "gradient", "stats", leaves=4)
def check_dpo_loss(case):
    """`dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta, smoothing, kind)`.

    Loss and gradient of both kinds; the reference gets none.
    """
    beta, smoothing = case.uniform(0.2, 0.6), case.uniform(0.1, 0.3)
    texts = [-5 + case.normal(6) for _ in range(4)]
    texts[2:] = [x + 0.5 * case.normal(6) for x in texts[:2]]
    shares = {"sigmoid": smoothing, "ipo": 0.0}
    return {f" of {kind}": (*texts, beta, x, kind) for kind, x in shares.items()}


SIZE, RANK = 5, 3  # as many inputs as outputs: what is turned around still fits
EVERY_INPUT = torch.eye(SIZE, dtype=torch.float64)


def _merged(layer, A, B, alpha, base=1, power=1, factor=1, turned=False, other=()):
    """W + (alpha / r) B A, as the layer stores it; the rest is what a mistake changes.

    `turned`: A B stands for B A. `other`: the kind that is stored the other way.
    """
    update = factor * alpha / RANK**power * ((A.t() @ B.t()) if turned else B @ A)
    is_turned = isinstance(layer, Conv1D) != isinstance(layer, other)
    return base * layer.weight + (update.t() if is_turned else update)


def _adapted(layer, A, B, alpha, base=1, turned_kind=Conv1D, **changes):
    """A layer of W x + (alpha / r) B A x."""
    weight = _merged(layer, A, B, alpha, base, **changes)
    weight = weight if isinstance(layer, turned_kind) else weight.t()
    return lambda x: x @ weight + base * layer.bias


SCALES = {
    "alpha / r is left out": {"alpha": RANK},
    "it is multiplied by alpha, and not divided by r": {"power": 0},
    "alpha is divided by the root of r, as in rsLoRA": {"power": 0.5},
    "the update is subtracted": {"factor": -1},
}
LAYER = {
    **SCALES,
    "W x is left out": {"base": 0},
    "the update is turned around": {"turned": True},
    "the adapter is off": {"factor": 0},
    "the weight of Conv1D is taken for that of nn.Linear":
        {"other": Conv1D, "turned_kind": ()},
}  # fmt: skip
WEIGHT = {
    **SCALES,
    "it is merged twice": {"factor": 2},
    "W is left out: this is the update alone": {"base": 0},
    "the update is not transposed for Conv1D, whose weight is (in, out)":
        {"other": Conv1D},
    "the update is transposed for nn.Linear, whose weight is (out, in)":
        {"other": nn.Linear},
}  # fmt: skip


def _layers(case):
    """The same W (out, in) and bias in both kinds of layer, and an adapter."""
    W, bias = case.normal(SIZE, SIZE), case.normal(SIZE)
    adapter = case.normal(RANK, SIZE), case.normal(SIZE, RANK), case.uniform(5, 9)
    calls = {}
    for kind, weight in ((nn.Linear, W), (Conv1D, W.t())):
        layer = kind(SIZE, SIZE)
        layer.weight.data, layer.bias.data = weight.clone(), bias.clone()
        calls[f" for {kind.__name__}"] = layer, *adapter
    return calls


@check(_adapted, LAYER, "result", read=lambda layer: layer(EVERY_INPUT))
def check_adapted_layer(case):
    """`adapted_layer(layer, A, B, alpha)` -> a layer of W x + (alpha / r) B A x."""
    return _layers(case)


@check(_merged, WEIGHT, "result")
def check_merged_weight(case):
    """`merged_weight(layer, A, B, alpha)` -> the weight, as the layer stores it."""
    return _layers(case)


def _read(
    states, labels, vocabulary, value_head, reward_head, logprobs="policy",
    values="policy", ref_logprobs=None, scores="reward", place=-1,
):  # fmt: skip
    """What is read under which adapter; None: all are off."""
    return {
        "logprobs": logprobs_of(states(logprobs) @ vocabulary.t(), labels),
        "values": value_head(states(values)),
        "ref_logprobs": logprobs_of(states(ref_logprobs) @ vocabulary.t(), labels),
        "scores": reward_head(states(scores)[:, place]),
    }


READING = {
    "policy and reference are swapped": {"logprobs": None, "ref_logprobs": "policy"},
    "the policy is read with its adapter off": {"logprobs": None},
    "the value head sees the base: the policy's adapter is off": {"values": None},
    "the value head sees the states under the reward adapter": {"values": "reward"},
    "the reference is read with the policy's adapter on: the KL is 0 for ever":
        {"ref_logprobs": "policy"},
    "the reference is read under the reward adapter": {"ref_logprobs": "reward"},
    "the score is read under the policy's adapter": {"scores": "policy"},
    "the score is read with all adapters off": {"scores": None},
    "the score is read at the first state, not at the last": {"place": 0},
}  # fmt: skip


@check(_read, READING, "")
def check_read_one_base(case):
    """`read_one_base(states, labels, vocabulary, value_head, reward_head)`.

    Logprobs and values under "policy", ref_logprobs with all adapters off, scores
    under "reward", at the last state.
    """
    shape, size, words = case.mask.shape, 4, 6
    found = {name: case.normal(*shape, size) for name in ("policy", "reward", None)}
    labels, vocabulary = case.integers(0, words, shape), case.normal(words, size)
    heads = [lambda x, w=w: x @ w for w in case.normal(2, size)]
    return lambda name: found[name].clone(), labels, vocabulary, *heads
