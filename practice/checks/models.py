"""Checks of what goes into a language model and of what comes out of it."""

import math
from types import SimpleNamespace

import torch

from practice.checks.comparison import check


def logprobs_of(
    logits, labels, tau=1.0, hot=1, roll=0, total=torch.logsumexp, of=torch.clone,
    power=0,
):  # fmt: skip
    """z_label - log sum exp z, in float64; the rest is what a mistake changes."""
    z, labels = logits.double() / tau**hot, labels.roll(roll, 1)
    chosen = z.gather(-1, labels[..., None])[..., 0]
    return of(chosen - total(z, dim=-1)) / tau**power


LOGPROBS = {
    "the label is the next slot's": {"roll": -1},
    "the label is the previous slot's": {"roll": 1},
    "the logarithm is left out": {"of": torch.exp},
    "the logits are not normalised (log-softmax)": {"total": lambda z, dim: 0},
    "the sign is turned": {"of": torch.neg},
    "the temperature is left out": {"tau": 1.0},
    "the logits are multiplied by tau": {"hot": -1},
    "the log-probabilities, not the logits, are divided": {"hot": 0, "power": 1},
}


@check(logprobs_of, LOGPROBS, "result")
def check_token_logprobs(case):
    """`token_logprobs(logits, labels, temperature)`: (B, T, V), (B, T) -> (B, T)."""
    logits, labels = 2 * case.normal(3, 5, 7), case.integers(0, 7, (3, 5))
    tau = case.uniform(1.3, 2.5)
    return {
        "": (logits, labels),
        " at another temperature": (logits, labels, tau),
        " at logits near -1000": (logits - 1000, labels),  # exp of which is 0
    }


EOS = 9


def _labels(ids, mask, roll=0):
    labels = ids.where(mask == 1, -100)
    return torch.cat([labels[:, roll:], labels[:, :roll] * 0 - 100], dim=1)


LABELS = {
    "padding is found by id == eos: the label of the closing EOS is lost":
        lambda ids, mask: ids.where(ids != EOS, -100),
    "padding keeps its labels; set them to -100": lambda ids, mask: ids,
    "the labels are shifted; the model shifts them itself": {"roll": 1},
}  # fmt: skip


@check(_labels, LABELS, "labels")
def check_lm_labels(case):
    """`lm_labels(input_ids, attention_mask)` where the padding is EOS, as in GPT-2."""
    ids = case.integers(0, EOS, case.mask.shape)
    before_the_last = torch.arange(ids.shape[1]) < case.lengths[:, None] - 1
    return ids.where(before_the_last, EOS), case.mask


@torch.no_grad()
def _each_alone(policy, ids, attention_mask, mask, tau, late=(0, 0), padding=0, eos=1):
    """Log-probabilities and values of each text alone, without its padding.

    `late`: how many places too far on the two are read.
    """
    logprobs, values = (torch.zeros(mask.shape, dtype=torch.float64) for _ in range(2))
    for b, n in enumerate(mask.sum(dim=1).tolist()):
        text = ids[b][attention_mask[b].bool()][None]
        start = text.shape[1] - n
        in_front = attention_mask.shape[1] - mask.shape[1] - start
        places = torch.arange(text.shape[1])[None] + padding * in_front
        out = policy.lm(text, position_ids=places, output_hidden_states=True)
        # The place before a token predicts it
        first, second = (slice(start - 1 + k, start - 1 + k + n) for k in late)
        found = logprobs_of(out.logits[:, first], text[:, start:], tau)[0]
        logprobs[b, :n] = found.where((text[0, start:] != 0) | bool(eos), 0)
        values[b, :n] = policy.value_head(out.hidden_states[-1][0, second])
    return logprobs, values


RESPONSES = {
    "the log-probabilities are shifted by one: logits predict the next token":
        {"late": (1, 0)},
    "the values are read one slot late, when the token has been chosen":
        {"late": (0, 1)},
    "the mask is built from id == eos: the closing EOS is lost": {"eos": 0},
    "the positions count the padding on the left": {"padding": 1},
    "the temperature is left out": {"tau": 1.0},
}  # fmt: skip


@check(_each_alone, RESPONSES, "logprobs", "values")
def check_evaluate_responses(case):
    """`evaluate_responses(policy, input_ids, attention_mask, mask, temperature)`.

    Log-probabilities and values (B, T) of responses to left-padded prompts, against
    each text alone. `policy` has an `lm` and a `value_head`.
    """
    # This takes three seconds, and no other check needs it
    from transformers import GPT2Config, GPT2LMHeadModel

    between = case.integers(1, 5, (len(case.mask) - 2,)).tolist()
    left = torch.arange(4) >= 4 - torch.tensor([1, 4, *between])[:, None]
    attention_mask = torch.cat([left.long(), case.mask], dim=1)
    ids = case.integers(1, 6, attention_mask.shape) * attention_mask  # EOS is 0
    ended = case.lengths < case.mask.shape[1]  # the longest response never ends
    ids[ended, 3 + case.lengths[ended]] = 0
    tau = case.uniform(1.3, 2.0)
    sizes = {"n_layer": 1, "n_head": 1, "n_embd": 4, "n_positions": ids.shape[1] + 4}
    lm = GPT2LMHeadModel(GPT2Config(vocab_size=6, **sizes)).double().eval()
    for weight in lm.parameters():  # far from uniform, so that a place too far shows
        weight.data = case.normal(*weight.shape)
    weights = case.normal(4)
    policy = SimpleNamespace(lm=lm, value_head=lambda hidden: hidden @ weights)
    return policy, ids, attention_mask, case.mask, tau


SIZE, ROOT = 9_999, 100  # the root of d + 1


def _head(d, draw=lambda d: torch.randn(d) / math.sqrt(d + 1), after=torch.clone):
    weight = draw(d)
    return lambda hidden: after(hidden @ weight)


def _of_head(head):
    """What a head is like: mean and spread in fifths, so that chance does not show."""
    hidden = 3 * torch.randn(2, 3, SIZE)
    hidden[0, 0] = 0  # the output is the bias, and its gradient the weights
    output = head(hidden.requires_grad_())
    weight = torch.autograd.grad(output.sum(), hidden)[0][0, 0]
    bias, linear = output.flatten()[0], (hidden @ weight).flatten()
    spread, mean = (round(5 * x.item() * ROOT) / 5 for x in torch.std_mean(weight))
    bent = ((output.flatten() - bias - linear).abs() > 1e-4).any()
    return {
        "share of weights that are 0": (weight == 0).double().mean().round(decimals=1),
        "spread * sqrt(d + 1)": spread,
        "mean * sqrt(d + 1)": mean,
        "bias": bias,
        "outputs that are not linear": bent.expand(output.shape),
    }


HEAD = {
    "the weights are zeros, as in the value head": {"draw": torch.zeros},
    "nn.Linear's own initial weights are kept":
        {"draw": lambda d: (2 * torch.rand(d) - 1) / math.sqrt(d)},
    "the spread is 1 / (d + 1), without the root":
        {"draw": lambda d: torch.randn(d) / (d + 1)},
    "the spread is GPT-2's 0.02": {"draw": lambda d: 0.02 * torch.randn(d)},
    "the output goes through a sigmoid": {"after": torch.sigmoid},
}  # fmt: skip


@check(_head, HEAD, "", read=_of_head)
def check_reward_head(case):
    """`RewardHead(hidden_size)`: (..., d) -> (...), N(0, 1/sqrt(d + 1)), bias 0."""
    return (SIZE,)
