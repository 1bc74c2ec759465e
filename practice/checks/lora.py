"""Checks of adapters: one layer, merging, and who is read under which."""

import math

import torch
from torch import nn

from practice.checks.comparison import check

SIZE, RANK = 5, 3  # as many inputs as outputs: what is turned around still fits


class Conv1D(nn.Module):
    """A layer like GPT-2's: its weight is (in, out)."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x):
        """(..., in) -> (..., out)."""
        return x @ self.weight + self.bias


def _layers(case):
    """The same W (out, in) and bias as `nn.Linear` and as `Conv1D`; and an adapter."""
    W, bias = case.normal(SIZE, SIZE), case.normal(SIZE)
    linear = nn.Linear(SIZE, SIZE, dtype=torch.float64)
    linear.weight.data, linear.bias.data = W.clone(), bias.clone()
    layers = {"nn.Linear": linear, "Conv1D": Conv1D(W.t().contiguous(), bias.clone())}
    adapter = case.normal(RANK, SIZE), case.normal(SIZE, RANK), case.uniform(5, 9)
    return layers, adapter


def _scaled(A, B, alpha, factor=lambda alpha: alpha / RANK, turned=False):
    """The update (out, in) of an adapter; or A B in the place of B A."""
    return factor(alpha) * ((A.t() @ B.t()) if turned else B @ A)


def _adapted(layer, A, B, alpha, base=1, as_linear=False, **changes):
    """A layer of W x + (alpha / r) B A x; the rest says what a mistake changes."""
    W = layer.weight
    if isinstance(layer, Conv1D) and not as_linear:
        W = W.t()
    update = _scaled(A, B, alpha, **changes)
    return lambda x: base * (x @ W.t() + layer.bias) + x @ update.t()


def _merged(layer, A, B, alpha, base=1, turn=(), **changes):
    """The weight as the layer stores it; `turn`: the kinds stored the other way."""
    update = _scaled(A, B, alpha, **changes)
    turned = isinstance(layer, Conv1D) != (type(layer).__name__ in turn)
    return base * layer.weight + (update.t() if turned else update)


SCALES = {
    "alpha / r is left out": {"factor": lambda alpha: 1},
    "it is multiplied by alpha, and not divided by r": {"factor": lambda alpha: alpha},
    "alpha is divided by the root of r, as in rsLoRA": {
        "factor": lambda alpha: alpha / math.sqrt(RANK)
    },
    "the update is subtracted": {"factor": lambda alpha: -alpha / RANK},
}
LAYER = {
    **SCALES,
    "W x is left out": {"base": 0},
    "the update is turned around": {"turned": True},
    "the adapter is off": {"factor": lambda alpha: 0},
    "the weight of Conv1D is taken for that of nn.Linear": {"as_linear": True},
}
WEIGHT = {
    **SCALES,
    "it is merged twice": {"factor": lambda alpha: 2 * alpha / RANK},
    "W is left out: this is the update alone": {"base": 0},
    "the update is not transposed for Conv1D, whose weight is (in, out)": {
        "turn": ["Conv1D"]
    },
    "the update is transposed for nn.Linear, whose weight is (out, in)": {
        "turn": ["Linear"]
    },
}


@check(_adapted, LAYER)
def check_adapted_layer(case):
    """`adapted_layer(layer, A, B, alpha)` -> a layer of W x + (alpha / r) B A x."""
    (layers, (A, B, alpha)), x = _layers(case), case.normal(4, SIZE)

    @torch.no_grad()
    def measure(function):
        return {
            f"output of {name}": function(layer, A.clone(), B.clone(), alpha)(x)
            for name, layer in layers.items()
        }

    return measure


@check(_merged, WEIGHT)
def check_merged_weight(case):
    """`merged_weight(layer, A, B, alpha)` -> the weight, as the layer stores it."""
    layers, (A, B, alpha) = _layers(case)

    @torch.no_grad()
    def measure(function):
        return {
            f"weight of {name}": function(layer, A.clone(), B.clone(), alpha)
            for name, layer in layers.items()
        }

    return measure


def _read(
    states,
    labels,
    vocabulary,
    value_head,
    reward_head,
    logprobs="policy",
    values="policy",
    ref_logprobs=None,
    scores="reward",
    place=-1,
):
    """What is read under which adapter; None: all are off."""

    def of_labels(name):
        z = states(name) @ vocabulary.t()
        chosen = z.gather(-1, labels[..., None])[..., 0]
        return chosen - z.exp().sum(dim=-1).log()

    return {
        "logprobs": of_labels(logprobs),
        "values": value_head(states(values)),
        "ref_logprobs": of_labels(ref_logprobs),
        "scores": reward_head(states(scores)[:, place]),
    }


READING = {
    "policy and reference are swapped": {"logprobs": None, "ref_logprobs": "policy"},
    "the policy is read with its adapter off": {"logprobs": None},
    "the value head sees the base: the policy's adapter is off": {"values": None},
    "the value head sees the states under the reward adapter": {"values": "reward"},
    "the reference is read with the policy's adapter on: the KL is 0 for ever": {
        "ref_logprobs": "policy"
    },
    "the reference is read under the reward adapter": {"ref_logprobs": "reward"},
    "the score is read under the policy's adapter": {"scores": "policy"},
    "the score is read with all adapters off": {"scores": None},
    "the score is read at the first state, not at the last": {"place": 0},
}


@check(_read, READING)
def check_read_one_base(case):
    """`read_one_base(states, labels, vocabulary, value_head, reward_head)`.

    Logprobs and values under "policy", ref_logprobs with all adapters off, scores
    under "reward", at the last state.
    """
    shape, size, words = case.mask.shape, 4, 6
    found = {name: case.normal(*shape, size) for name in ("policy", "reward", None)}
    labels, vocabulary = case.integers(0, words, shape), case.normal(words, size)
    weights = case.normal(2, size)
    heads = [lambda x, w=w: x @ w for w in weights]

    @torch.no_grad()
    def measure(function):
        return function(lambda name: found[name].clone(), labels, vocabulary, *heads)

    return measure
