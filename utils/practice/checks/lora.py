"""Checks of adapters: one layer, merging, and who is read under which."""

import math

import torch
from torch import nn

from utils.practice.checks.case import Case
from utils.practice.checks.comparison import Result, compare, name_of

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
    A, B = case.normal(RANK, SIZE), case.normal(SIZE, RANK)
    return layers, (W.tolist(), bias.tolist()), (A, B), case.uniform(5, 9)


def _product(A, B, turned=False):
    """B A (out, in), number by number; or A B in its place, as far as that fits."""
    a, b, n = A.tolist(), B.tolist(), range(SIZE)
    if turned:
        return [[sum(b[i][k] * a[k][o] for k in range(RANK)) for i in n] for o in n]
    return [[sum(b[o][k] * a[k][i] for k in range(RANK)) for i in n] for o in n]


SCALES = [
    ("alpha / r is left out", lambda alpha: 1.0),
    ("it is multiplied by alpha, and not divided by r", lambda alpha: alpha),
    (
        "alpha is divided by the root of r, as in rsLoRA",
        lambda alpha: alpha / math.sqrt(RANK),
    ),
]


@torch.no_grad()
def check_adapted_layer(function, seed: int = 0) -> Result:
    """`adapted_layer(layer, A, B, alpha)` -> a layer of W x + (alpha / r) B A x."""
    case = Case(seed)
    layers, (W, bias), (A, B), alpha = _layers(case)
    x = case.normal(4, SIZE)

    def outputs(s=alpha / RANK, update=None, base=1, plus=1):
        update = update or _product(A, B)
        rows = [
            [
                base * sum(W[o][i] * row[i] for i in range(SIZE))
                + s * sum(update[o][i] * row[i] for i in range(SIZE))
                + plus * bias[o]
                for o in range(SIZE)
            ]
            for row in x.tolist()
        ]
        return {f"output of {name}": rows for name in layers}

    mistakes = [(said, outputs(s=scale(alpha))) for said, scale in SCALES]
    mistakes += [
        ("W x is left out", outputs(base=0, plus=0)),
        ("the update is turned around", outputs(update=_product(A, B, turned=True))),
        ("the adapter is off", outputs(s=0.0)),
        ("the update is subtracted", outputs(s=-alpha / RANK)),
        (
            "the weight of Conv1D is taken for that of nn.Linear",
            {
                "output of Conv1D": (
                    x @ torch.tensor(W, dtype=torch.float64)
                    + torch.tensor(bias, dtype=torch.float64)
                    + alpha / RANK * x @ A.t() @ B.t()
                )
            },
        ),
    ]

    def call():
        return {
            f"output of {name}": function(layer, A.clone(), B.clone(), alpha)(x)
            for name, layer in layers.items()
        }

    return compare(name_of(function), call, outputs(), mistakes)


@torch.no_grad()
def check_merged_weight(function, seed: int = 0) -> Result:
    """`merged_weight(layer, A, B, alpha)` -> the weight, as the layer stores it."""
    layers, (W, _), (A, B), alpha = _layers(Case(seed))
    places = range(SIZE)

    def weights(s=alpha / RANK, base=1, update=None):
        update = update or _product(A, B)
        rows = [[base * W[o][i] + s * update[o][i] for i in places] for o in places]
        turned = [[rows[o][i] for o in places] for i in places]
        return {"weight of nn.Linear": rows, "weight of Conv1D": turned}

    turned = weights(update=_product(A, B, turned=True))
    mistakes = [(said, weights(s=scale(alpha))) for said, scale in SCALES]
    mistakes += [
        ("it is merged twice", weights(s=2 * alpha / RANK)),
        ("the update is subtracted", weights(s=-alpha / RANK)),
        ("W is left out: this is the update alone", weights(base=0)),
        (
            "the update is not transposed for Conv1D, whose weight is (in, out)",
            {"weight of Conv1D": turned["weight of Conv1D"]},
        ),
        (
            "the update is transposed for nn.Linear, whose weight is (out, in)",
            {"weight of nn.Linear": turned["weight of nn.Linear"]},
        ),
    ]

    def call():
        return {
            f"weight of {name}": function(layer, A.clone(), B.clone(), alpha)
            for name, layer in layers.items()
        }

    return compare(name_of(function), call, weights(), mistakes)


@torch.no_grad()
def check_read_one_base(function, seed: int = 0) -> Result:
    """`read_one_base(states, labels, vocabulary, value_head, reward_head)`.

    Logprobs and values under "policy", ref_logprobs with all adapters off, scores
    under "reward", at the last state.
    """
    case, size, words = Case(seed), 4, 6
    batch, length = case.mask.shape
    found = {name: case.normal(batch, length, size) for name in ("policy", "reward")}
    found[None] = case.normal(batch, length, size)
    labels = case.integers(0, words, (batch, length))
    vocabulary = case.normal(words, size)
    value, reward = case.normal(size).tolist(), case.normal(size).tolist()

    def dot(x, y):
        return sum(a * b for a, b in zip(x, y, strict=True))

    def log_softmax(state, label):
        logits = [dot(state, row) for row in vocabulary.tolist()]
        return logits[label] - math.log(sum(math.exp(z) for z in logits))

    def logprobs(name):
        rows = zip(found[name].tolist(), labels.tolist(), strict=True)
        return [[log_softmax(*one) for one in zip(*row, strict=True)] for row in rows]

    def values(name):
        return [[dot(state, value) for state in row] for row in found[name].tolist()]

    def scores(name, place=-1):
        return [dot(row[place], reward) for row in found[name].tolist()]

    expected = {
        "logprobs": logprobs("policy"),
        "values": values("policy"),
        "ref_logprobs": logprobs(None),
        "scores": scores("reward"),
    }
    mistakes = [
        (
            "policy and reference are swapped",
            {"logprobs": logprobs(None), "ref_logprobs": logprobs("policy")},
        ),
        (
            "the policy is read with its adapter off",
            {"logprobs": logprobs(None), "ref_logprobs": logprobs(None)},
        ),
        (
            "the value head sees the base: the policy's adapter is off",
            {"values": values(None)},
        ),
        (
            "the value head sees the states under the reward adapter",
            {"values": values("reward")},
        ),
        (
            "the reference is read with the policy's adapter on: the KL is 0 for ever",
            {"ref_logprobs": logprobs("policy")},
        ),
        (
            "the reference is read under the reward adapter",
            {"ref_logprobs": logprobs("reward")},
        ),
        ("the score is read under the policy's adapter", {"scores": scores("policy")}),
        ("the score is read with all adapters off", {"scores": scores(None)}),
        (
            "the score is read at the first state, not at the last",
            {"scores": scores("reward", 0)},
        ),
    ]

    def call():
        weights = (torch.tensor(w, dtype=torch.float64) for w in (value, reward))
        heads = [lambda x, w=w: x @ w for w in weights]
        return function(lambda name: found[name].clone(), labels, vocabulary, *heads)

    return compare(name_of(function), call, expected, mistakes)
