import dataclasses
import itertools
import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from utils.data import pad
from utils.models import PolicyWithValueHead
from utils.rollout import (
    Rollout,
    evaluate_responses,
    has_ended,
    normalise_scores,
    response_logprobs,
    sample_responses,
)

EOS = 0
PROMPTS = [[5, 6, 7, 8], [3], [4, 2]]


def small_lm(vocabulary=10, seed=0):
    torch.manual_seed(seed)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, **sizes))
    for weight in model.parameters():  # far from uniform, so that errors show
        torch.nn.init.normal_(weight, std=0.3)
    return model.double().eval()


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


def test_sampling_is_seeded():
    model = small_lm()
    assert torch.equal(sample(model)[0], sample(model)[0])
    assert not torch.equal(
        sample(model, PROMPTS * 9)[0], sample(model, PROMPTS * 9, seed=1)[0]
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_what_is_sampled_is_the_policy(temperature):
    """Frequencies of all two-token responses against their exact probabilities."""
    model, n = small_lm(vocabulary=4), 4000
    prompts = [[1, 2, 3], [2]]
    ids, _, mask = sample(model, prompts * n, n=2, temperature=temperature)
    responses = ids[:, -mask.shape[1] :]
    for k, prompt in enumerate(prompts):
        drawn = [tuple(r.tolist()) for r in responses[k::2]]
        for pair in itertools.product(range(4), repeat=2):
            if pair[0] == EOS and pair[1] != EOS:
                continue  # after EOS there is only filling
            logits = model(torch.tensor([prompt + [pair[0]]])).logits[0] / temperature
            p = logits[-2].softmax(0)[pair[0]].item()
            if pair[0] != EOS:
                p *= logits[-1].softmax(0)[pair[1]].item()
            se = math.sqrt(p * (1 - p) / n)
            assert abs(drawn.count(pair) / n - p) <= 4.5 * se


def test_a_finished_response_costs_nothing():
    """Each step runs only the responses that go on, one new token of each."""
    model, sizes = small_lm(), []
    model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    _, _, mask = sample(model, PROMPTS * 20)
    # a response of n tokens takes the prompt and its first n - 1 tokens as input
    going_on = mask[:, 1:].sum(0).tolist()
    assert sizes[0] == (60, 4)
    assert sizes[1:] == [(n, 1) for n in going_on]


@torch.no_grad()
def one_by_one(policy, ids, attention, mask):
    """Log-probabilities and values of each response alone, without any padding."""
    logprobs, values = torch.zeros(2, *mask.shape, dtype=torch.float64)
    for b in range(len(ids)):
        text, n = ids[b][attention[b].bool()], int(mask[b].sum())
        hidden = policy.lm.base_model(text[None]).last_hidden_state[0]
        logits = policy.lm(text[None]).logits[0]
        for t in range(n):
            place = len(text) - n + t  # of the token; it is predicted one before
            p = logits[place - 1].softmax(0)[text[place]]
            logprobs[b, t] = p.log()
            values[b, t] = policy.value_head(hidden[place - 1])
    return logprobs, values


def test_logprobs_and_values_are_read_one_place_before_the_token():
    policy = PolicyWithValueHead(small_lm()).double()
    torch.nn.init.normal_(policy.value_head.weight)
    sampled = sample(policy.lm, PROMPTS * 4)
    expected = one_by_one(policy, *sampled)
    for got, want in zip(evaluate_responses(policy, *sampled), expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-9, rtol=0)


def test_response_logprobs_divide_by_the_temperature():
    lm = small_lm()
    ids, attention, mask = sample(lm, [[5, 6]], n=1)
    got = response_logprobs(lm, ids, attention, mask, temperature=2.0)
    exact = (lm(ids[:, :2]).logits[0, -1] / 2).log_softmax(0)[ids[0, 2]]
    assert got.item() == pytest.approx(exact.item(), abs=1e-12)


def test_has_ended_looks_at_the_response_only():
    ids = torch.tensor([[EOS, 5, 6, EOS], [4, 5, 6, 7], [4, 5, EOS, EOS]])
    mask = torch.tensor([[1, 1], [1, 1], [1, 0]])
    assert has_ended(ids, mask, EOS).tolist() == [True, False, True]


def test_normalise_scores_by_hand():
    got = normalise_scores(
        torch.tensor([3.0, 7.0]), torch.tensor([True, False]), 1.0, 4.0, -1.0
    )
    assert got.tolist() == [0.5, -1.0]


def make_rollout(**changes):
    fields = {name: torch.zeros(2, 3) for name in field_names()}
    fields |= {name: torch.zeros(2, 5) for name in ("input_ids", "attention_mask")}
    fields |= {name: torch.zeros(2) for name in ("raw_scores", "scores")}
    fields["mask"] = torch.tensor([[1, 1, 1], [1, 0, 0]])
    return Rollout(**{**fields, **changes})


def field_names():
    return [field.name for field in dataclasses.fields(Rollout)]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}, r"\[0, 0, 0\]"),
        ({"mask": torch.tensor([[1, 1, 1], [1, 0, 1]])}, r"\[1, 0, 1\]"),
        ({"mask": torch.tensor([[0, 1, 1], [1, 1, 0]])}, r"\[0, 1, 1\]"),
        ({"scores": torch.tensor([0.0, float("nan")])}, "one of the scores is nan"),
        ({"old_values": torch.zeros(2, 4)}, r"old_values has shape \(2, 4\).*\(2, 3\)"),
        ({"scores": torch.zeros(2, 1)}, r"scores has shape \(2, 1\).*\(2,\)"),
        ({"attention_mask": torch.zeros(2, 6)}, r"attention_mask.*\(2, 6\).*\(2, 5\)"),
    ],
)
def test_a_broken_rollout_is_refused(changes, message):
    make_rollout()
    with pytest.raises(ValueError, match=message):
        make_rollout(**changes)


def test_rows_of_a_rollout():
    part = make_rollout(scores=torch.tensor([1.0, 2.0])).rows(torch.tensor([1]))
    assert len(part) == 1
    assert part.scores.tolist() == [2.0] and part.mask.tolist() == [[1, 0, 0]]
