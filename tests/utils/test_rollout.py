"""Sampling, what is measured on the samples, and the fast log-probabilities."""

import dataclasses
import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import refused
from tests.small import EOS, PROMPTS, small_lm
from utils.data import pad
from utils.models import label_logprobs, vocabulary_logits
from utils.ppo import token_logprobs
from utils.rollout import (
    Rollout,
    draw,
    has_ended,
    normalise_scores,
    response_tokens,
    sample_responses,
    score_scale,
)

NAN = math.nan


def sample(model, prompts=PROMPTS, n=20, seed=0, temperature=1.0):
    generator = torch.Generator().manual_seed(seed)
    padded = pad(prompts, EOS, side="left")
    return sample_responses(model, *padded, EOS, n, temperature, generator)


def test_responses_stop_at_eos_and_the_mask_says_so():
    ids, attention, mask = sample(small_lm(), PROMPTS * 20)
    start = ids.shape[1] - mask.shape[1]
    lengths = set()
    for row, real, m, prompt in zip(ids, attention, mask, PROMPTS * 20, strict=True):
        response = row[start:].tolist()
        n = response.index(EOS) + 1 if EOS in response else len(response)
        assert m.tolist() == [1] * n + [0] * (len(response) - n)
        assert row[real.bool()].tolist() == prompt + response[:n]
        lengths.add(n)
    assert 1 in lengths and len(lengths) > 3  # the short and the long were there
    again, other = (sample(small_lm(), PROMPTS * 20, seed=x)[0] for x in (0, 1))
    assert torch.equal(ids, again) and not torch.equal(ids, other)


def test_what_is_sampled_is_the_policy():
    """Frequencies of all two-token responses against their exact probabilities."""
    model, n, prompts, tau = small_lm(vocabulary=4), 4000, [[1, 2, 3], [2]], 2.0
    ids, _, mask = sample(model, prompts * n, n=2, temperature=tau)
    responses = ids[:, -mask.shape[1] :].tolist()
    for k, prompt in enumerate(prompts):
        for pair in [[EOS, EOS], *map(list, itertools.product((1, 2, 3), range(4)))]:
            # after EOS there is only filling
            logits = model(torch.tensor([prompt + pair[:1]])).logits[0, -2:] / tau
            first, second = logits.softmax(-1)
            p = first[pair[0]].item() * (second[pair[1]].item() if pair[0] else 1)
            share = responses[k::2].count(pair) / n
            assert abs(share - p) <= 4.5 * math.sqrt(p * (1 - p) / n)


def test_ends_tokens_and_scores_by_hand():
    ids = torch.tensor([[EOS, 5, 6, EOS], [4, 5, 6, 7], [4, 5, EOS, EOS]])
    mask = torch.tensor([[1, 1], [1, 1], [1, 0]])
    ended = has_ended(ids, mask, EOS)
    assert ended.tolist() == [True, False, True]
    assert response_tokens(ids, mask) == [[6, EOS], [6, 7], [EOS]]
    scores = normalise_scores(torch.tensor([3.0, 7.0, 1.0]), ended, 1.0, 4.0, -1.0)
    assert scores.tolist() == [0.5, -1.0, 0.0]


@pytest.mark.parametrize(
    "middle, spread, good",  # for how many of the three precisions it is a scale
    [(3, 0.3, 3), (3, 3e-3, 1), (3, 3e-7, 0), (0, 1e-9, 3), (3, NAN, 0), (3, 0, 0)],
)
def test_a_spread_that_may_be_rounding_is_no_scale(middle, spread, good):
    """A half-precision trunk rounds more; around 0 small scores are as exact as any."""
    raw = middle + spread * torch.linspace(-1, 1, 64)
    for i, dtype in enumerate((torch.float32, torch.float16, torch.bfloat16)):
        if i < good:
            expected = (raw.mean().item(), raw.std().item())
            assert score_scale(raw, dtype) == pytest.approx(expected, abs=1e-12)
        else:
            refused(f"64 .*{str(dtype)[6:]}; train it on", score_scale, raw, dtype)


BROKEN = [
    ("mask", [[1, 1, 1], [0, 0, 0]], r"\[0, 0, 0\]"),
    ("mask", [[1, 1, 1], [1, 0, 1]], r"\[1, 0, 1\]"),
    ("scores", [0.0, NAN], "one of the scores is nan; check the model"),
    ("old_values", [[math.inf] * 3] * 2, "one of the old_values is inf"),
    ("old_values", [[0.0] * 4] * 2, r"old_values has shape \(2, 4\).*\(2, 3\)"),
    ("attention_mask", [[1] * 6] * 2, r"attention_mask.*\(2, 6\).*\(2, 5\)"),
]


@pytest.mark.parametrize("name, value, message", BROKEN)
def test_a_broken_rollout_is_refused(name, value, message):
    """One that is whole has two responses of at most three tokens."""
    names = [f.name for f in dataclasses.fields(Rollout) if f.name != "cpu_mask"]
    fields = {name: torch.zeros(2, 3) for name in names}
    fields |= {name: torch.zeros(2, 5) for name in ("input_ids", "attention_mask")}
    fields |= {name: torch.zeros(2) for name in ("raw_scores", "scores")}
    fields["mask"] = torch.tensor([[1, 1, 1], [1, 0, 0]])
    Rollout(**fields)
    refused(message, Rollout, **{**fields, name: torch.tensor(value)})


def head(weight):
    """A language model of which nothing is there but the vocabulary projection."""
    projection = SimpleNamespace(weight=weight, bias=None)
    return SimpleNamespace(get_output_embeddings=lambda: projection)


def linear_case(n, words, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, 4, generator=generator, dtype=dtype)
    weight = torch.randn(words, 4, generator=generator, dtype=dtype)
    labels = torch.randint(words, (n,), generator=generator)
    labels[1] = labels[0]  # two gradients for the same row of the weight
    return hidden.requires_grad_(), weight.requires_grad_(), labels


@pytest.mark.parametrize("temperature, frozen", [(1.0, False), (2.5, True)])
def test_label_logprobs_are_token_logprobs_of_the_logits(temperature, frozen):
    """Values and gradients, against automatic differentiation; with less memory."""
    hidden, weight, labels = linear_case(7, 9)
    lm, inputs = head(weight.requires_grad_(not frozen)), [hidden, weight][: 2 - frozen]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel()) or x, lambda x: x
    ):
        ours = label_logprobs(lm, hidden, labels, temperature)
    assert sum(size >= 7 * 9 for size in kept) == 1  # one tensor as large as the logits
    plain = token_logprobs(vocabulary_logits(lm, hidden), labels, temperature)
    upstream = torch.randn(len(labels), dtype=torch.float64)
    gradients = [
        torch.autograd.grad((x * upstream).sum(), inputs) for x in (ours, plain)
    ]
    torch.testing.assert_close(ours, plain, atol=1e-12, rtol=0)
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=0)
    says = r"hidden without d \(7,\).*labels \(6,\)"
    refused(says, label_logprobs, lm, hidden, labels[:6])


def test_label_logprobs_near_gpt2s_logits_and_from_half_precision():
    """An offset of -100 costs a few times the rounding of float32 there, 8e-6."""
    hidden, weight, labels = linear_case(6, 50, torch.float32)
    hidden = hidden.detach().bfloat16().requires_grad_()
    exact = token_logprobs(hidden.double() @ weight.double().t(), labels)
    ones = torch.cat([hidden, torch.full((6, 1), -100.0)], dim=1)
    shifted = head(torch.cat([weight, torch.ones(50, 1)], dim=1))
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the trunk's, and not ours
        got = label_logprobs(shifted, ones, labels)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, atol=3e-5, rtol=0)
    got.sum().backward()
    assert hidden.grad.dtype == torch.bfloat16 and hidden.grad.abs().sum() > 0
    half = head(weight.detach().bfloat16())
    assert label_logprobs(half, hidden, labels).dtype == torch.float32


def test_what_has_no_chance_is_never_drawn(monkeypatch):
    """Not even by the smallest or the largest number; of NaN, a word that there is."""
    half, nan = [0.0, 0.5, 0.5, 0.0], [NAN] * 4
    for place, row, word in ((0.0, half, 1), (1 - 2**-53, half, 2), (0.5, nan, 3)):
        number = torch.full((2, 1), place, dtype=torch.float64)
        monkeypatch.setattr(torch, "rand", lambda *_, x=number, **__: x)
        assert draw(torch.tensor([row] * 2)).tolist() == [word] * 2
