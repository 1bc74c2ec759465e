"""Checks of adapters: one layer, merging, and who is read under which."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D  # GPT-2's layer; its weight is (in, out)

from practice.checks.comparison import check

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
