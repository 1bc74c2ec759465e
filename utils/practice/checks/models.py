"""Checks of what goes into a language model and of what comes out of it."""

import math
from types import SimpleNamespace

import torch
from torch import nn

from utils.practice.checks.case import Case
from utils.practice.checks.comparison import Result, compare, name_of


def _log_softmax(logits, label):
    largest = max(logits)
    return (
        logits[label] - largest - math.log(sum(math.exp(x - largest) for x in logits))
    )


def check_token_logprobs(function, seed: int = 0) -> Result:
    """`token_logprobs(logits, labels, temperature)`: (B, T, V), (B, T) -> (B, T)."""
    case = Case(seed)
    logits = 2 * case.normal(3, 5, 7)
    labels = case.integers(0, 7, (3, 5))
    tau = case.uniform(1.3, 2.5)
    low = (logits - 100).float()  # where GPT-2's logits lie
    at_tau, near_100 = "result at another temperature", "result at logits near -100"

    def logprobs(logits, labels):
        places = zip(logits.flatten(0, 1).tolist(), labels.flatten(), strict=True)
        numbers = [_log_softmax(x, i) for x, i in places]
        return torch.tensor(numbers, dtype=torch.float64).view(labels.shape)

    right = logprobs(logits, labels)
    picked = logits.gather(-1, labels[..., None])[..., 0]
    mistakes = [
        (
            "the label is the next slot's",
            {"result": logprobs(logits, labels.roll(-1, 1))},
        ),
        (
            "the label is the previous slot's",
            {"result": logprobs(logits, labels.roll(1, 1))},
        ),
        ("the logarithm is left out", {"result": right.exp()}),
        ("the logits are not normalised (log-softmax)", {"result": picked}),
        ("the sign is turned", {"result": -right}),
        ("the temperature is left out", {at_tau: right}),
        ("the logits are multiplied by tau", {at_tau: logprobs(logits * tau, labels)}),
        ("the log-probabilities, not the logits, are divided", {at_tau: right / tau}),
    ]

    def call():
        return {
            "result": function(logits.clone(), labels),
            at_tau: function(logits.clone(), labels, tau),
            near_100: function(low.clone(), labels),
        }

    expected = {
        "result": right,
        at_tau: logprobs(logits / tau, labels),
        near_100: right,
    }
    return compare(name_of(function), call, expected, mistakes, {near_100: 1e-4})


def check_lm_labels(function, seed: int = 0) -> Result:
    """`lm_labels(input_ids, attention_mask)` where the padding is EOS, as in GPT-2."""
    case, eos = Case(seed), 9
    last = torch.tensor(case.lengths)[:, None] - 1
    ids = case.integers(0, eos, case.mask.shape)
    ids = ids.where(torch.arange(case.width) < last, eos)
    labels = ids.where(case.mask == 1, -100)
    shifted = labels.roll(-1, dims=1).where(torch.arange(case.width) < last, -100)
    mistakes = [
        (
            "padding is found by id == eos: the label of the closing EOS is lost",
            {"labels": ids.where(ids != eos, -100)},
        ),
        ("padding keeps its labels; set them to -100", {"labels": ids}),
        ("the labels are shifted; the model shifts them itself", {"labels": shifted}),
    ]
    return compare(
        name_of(function),
        lambda: {"labels": function(ids.clone(), case.mask.clone())},
        {"labels": labels},
        mistakes,
    )


class _Trunk(nn.Module):
    """The hidden state at a place depends on its position and on all tokens up to it,
    so that a place too far to either side shows.
    """

    def __init__(self, words, places):
        super().__init__()
        self.words, self.places = nn.Embedding.from_pretrained(words), places

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        **_,
    ):
        words = self.words(input_ids) if inputs_embeds is None else inputs_embeds
        if attention_mask is None:
            attention_mask = torch.ones(words.shape[:2])
        if position_ids is None:
            position_ids = torch.arange(words.shape[1]).expand(words.shape[:2])
        seen = (words * attention_mask[..., None]).cumsum(dim=1)
        hidden = torch.tanh(seen / 2 + self.places[position_ids])
        return SimpleNamespace(last_hidden_state=hidden)

    def get_input_embeddings(self):
        return self.words


class _Model(nn.Module):
    """A causal language model of tables, called like those of transformers."""

    def __init__(self, case, n_words, size, n_places):
        super().__init__()
        self.base_model = _Trunk(
            case.normal(n_words, size), case.normal(n_places, size)
        )
        self.head = nn.Linear(size, n_words, bias=False, dtype=torch.float64)
        self.head.weight.data = case.normal(n_words, size)

    def forward(self, *arguments, **options):
        hidden = self.base_model(*arguments, **options).last_hidden_state
        return SimpleNamespace(logits=self.head(hidden))

    def get_output_embeddings(self):
        return self.head


@torch.no_grad()
def check_evaluate_responses(function, seed: int = 0) -> Result:
    """`evaluate_responses(policy, input_ids, attention_mask, mask, temperature)`.

    Log-probabilities and values (B, T) of responses to left-padded prompts, against
    each text alone. `policy` has an `lm` and a `value_head`.
    """
    case, n_words, eos = Case(seed), 6, 0
    prompts = [1, 4, *case.integers(1, 5, (len(case.lengths) - 2,)).tolist()]
    left = torch.arange(4) >= 4 - torch.tensor(prompts)[:, None]
    attention_mask = torch.cat([left.long(), case.mask], dim=1)
    ids = case.integers(1, n_words, attention_mask.shape)
    for b, n in enumerate(case.lengths):
        if n < case.width:  # the longest response never ends
            ids[b, 4 + n - 1 :] = eos
    ids[~attention_mask.bool()] = eos
    tau, width = case.uniform(1.3, 2.0), attention_mask.shape[1]
    lm, weights = _Model(case, n_words, 4, width + 4), case.normal(4)
    policy = SimpleNamespace(lm=lm, value_head=lambda hidden: hidden @ weights)

    def answer(late=0, tau=tau, padding_counts=False, skip=None):
        """Log-probabilities and values of each text alone."""
        logprobs, values = [], []
        for b, n in enumerate(case.lengths):
            text = ids[b][attention_mask[b].bool()]
            places = torch.arange(len(text)) + padding_counts * (4 - prompts[b])
            hidden = lm.base_model(text[None], None, places[None]).last_hidden_state[0]
            logits = (lm.head(hidden) / tau).tolist()
            first = prompts[b] - 1 + late  # the place that predicts the first token
            predicted = zip(logits[first : first + n], text[prompts[b] :], strict=True)
            logprobs.append([_log_softmax(x, i) * (i != skip) for x, i in predicted])
            values.append((hidden[first : first + n] @ weights).tolist())
        return {"logprobs": case.table(logprobs), "values": case.table(values)}

    late = answer(late=1)
    mistakes = [
        (
            "the log-probabilities are shifted by one: logits predict the next token",
            {"logprobs": late["logprobs"]},
        ),
        (
            "the values are read one slot late, when the token has been chosen",
            {"values": late["values"]},
        ),
        (
            "the mask is built from id == eos: the closing EOS is lost",
            {"logprobs": answer(skip=eos)["logprobs"]},
        ),
        ("the positions count the padding on the left", answer(padding_counts=True)),
        ("the temperature is left out", {"logprobs": answer(tau=1.0)["logprobs"]}),
    ]

    def call():
        logprobs, values = function(policy, ids, attention_mask, case.mask, tau)
        return {"logprobs": logprobs, "values": values}

    return compare(name_of(function), call, answer(), mistakes)


@torch.no_grad()
def check_reward_head(cls, seed: int = 0) -> Result:
    """`RewardHead(hidden_size)`: (..., d) -> (...), N(0, 1/sqrt(d + 1)), bias 0.

    The weights are a sample: mean and spread may be off by 5 standard errors.
    """
    d, heads, roots = 512, 8, math.sqrt(513)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = [cls(d) for _ in range(heads)]
        hidden = torch.randn(2, 3, d)

    def call():
        zero, unit = torch.zeros(1, d), torch.eye(d)
        bias = torch.stack([head(zero).view(()) for head in made])
        weight = torch.stack([head(unit).view(d) for head in made]) - bias[:, None]
        output = made[0](hidden)
        linear = hidden @ weight[0] + bias[0]
        return {
            "share of weights that are 0": (weight == 0).double().mean(),
            "spread * sqrt(d + 1)": weight.std() * roots,
            "mean * sqrt(d + 1)": weight.mean() * roots,
            "bias": bias,
            "output less that of a linear function": output - linear.view(output.shape),
        }

    expected = {
        "share of weights that are 0": 0.0,
        "spread * sqrt(d + 1)": 1.0,
        "mean * sqrt(d + 1)": 0.0,
        "bias": torch.zeros(heads),
        "output less that of a linear function": torch.zeros(2, 3),
    }
    spread = "spread * sqrt(d + 1)"
    mistakes = [
        (
            "the weights are zeros, as in the value head",
            {"share of weights that are 0": 1.0},
        ),
        (
            "nn.Linear's own initial weights are kept",
            {spread: roots / math.sqrt(3 * d)},
        ),
        ("the spread is 1 / (d + 1), without the root", {spread: 1 / roots}),
        ("the spread is GPT-2's 0.02", {spread: 0.02 * roots}),
        ("the output goes through a sigmoid", {spread: 0.25, "bias": [0.5] * heads}),
    ]
    error = 1 / math.sqrt(heads * d)  # the standard error of a mean of N(0, 1)
    bounds = {spread: 5 * error / math.sqrt(2), "mean * sqrt(d + 1)": 5 * error}
    return compare(name_of(cls), call, expected, mistakes, bounds)
