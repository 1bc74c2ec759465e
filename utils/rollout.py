"""Sampling from the policy, and measuring what was sampled."""

import copy
import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from utils.models import (
    cache_argument,
    hidden_states_by_length,
    position_ids,
    vocabulary_logits,
    vocabulary_weight,
)
from utils.ppo import linear_logprobs


def draw_tokens(
    lm: nn.Module,
    hidden: Tensor,
    temperature: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token (N,) from the distribution that follows each hidden state (N, d).

    The probabilities stand end to end on a line of length 1; where a random number
    falls, there is the token. `torch.multinomial` draws a random number for each word
    of the vocabulary instead, which takes a CPU longer than the projection. A hidden
    state that is not a number draws the last word; `Rollout` then finds it.
    """
    tokens = []
    for rows in hidden.split(64):  # few enough for their logits to stay in the cache
        probs = torch.softmax(vocabulary_logits(lm, rows) / temperature, dim=-1)
        ends = probs.cumsum(dim=-1, dtype=torch.float64)
        places = torch.rand(
            (len(rows), 1), dtype=ends.dtype, device=ends.device, generator=generator
        )
        found = torch.searchsorted(ends, places * ends[:, -1:], right=True)
        # A NaN falls behind the last word, and such an index ends a GPU's process
        tokens.append(found.clamp(max=ends.shape[1] - 1))
    return torch.cat(tokens).squeeze(1)


@torch.no_grad()
def sample_responses(
    lm: nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    eos_id: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Continue left-padded prompts (B, P) until each response ends.

    Returns input_ids and attention_mask (B, P + T), and the response mask (B, T), 1
    up to and including EOS, where T is the longest response. Nothing is cut from the
    distribution (no top-k, no top-p, no minimum length), so that what PPO takes for
    pi_old is what was sampled. Keys and values are cached: each step runs one token
    of each response that is not finished.
    """
    width = prompt_ids.shape[1]
    input_ids = F.pad(prompt_ids, (0, max_new_tokens), value=eos_id)
    attention_mask = F.pad(prompt_mask, (0, max_new_tokens))
    rows = torch.arange(len(prompt_ids), device=prompt_ids.device)  # not finished
    start, cache = 0, DynamicCache(config=lm.config)
    cached = {cache_argument(lm.base_model): cache, "use_cache": True}
    for end in range(width, width + max_new_tokens):
        mask = attention_mask[rows, :end]
        output = lm.base_model(
            input_ids=input_ids[rows, start:end],
            attention_mask=mask,
            position_ids=position_ids(mask)[:, start:],
            **cached,
        )
        hidden = output.last_hidden_state[:, -1]
        tokens = draw_tokens(lm, hidden, temperature, generator)
        input_ids[rows, end], attention_mask[rows, end] = tokens, 1
        start, alive = end, (tokens != eos_id).nonzero().squeeze(1)
        if len(alive) == 0:
            break
        if len(alive) < len(rows):
            rows = rows[alive]
            cache.batch_select_indices(alive)
    length = end + 1
    return (
        input_ids[:, :length],
        attention_mask[:, :length],
        attention_mask[:, width:length],
    )


def response_hidden_states(
    lm: nn.Module, input_ids: Tensor, attention_mask: Tensor, mask: Tensor
) -> Tensor:
    """The hidden states (B, T, d) from which each response token was predicted.

    The response stands at c ... c + T - 1 of the text, so its logits, and the value
    before each token is chosen, are read one place earlier: at c - 1 ... c + T - 2.
    """
    start = input_ids.shape[1] - mask.shape[1]
    ends = start + mask.sum(dim=1)
    trunk = lm.base_model
    hidden = hidden_states_by_length(trunk, input_ids, attention_mask, ends)
    return hidden[:, start - 1 : -1]


def response_logprobs(
    lm: nn.Module,
    hidden: Tensor,
    input_ids: Tensor,
    mask: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """Log-probabilities (B, T) of the response tokens; 0 outside the mask.

    `hidden` comes from `response_hidden_states`. The projection to the vocabulary is
    most of the arithmetic, so it is made for real response tokens only.
    """
    real = mask.flatten().nonzero().squeeze(1).to(hidden.device, non_blocking=True)
    labels = input_ids[:, -mask.shape[1] :].flatten()[real]
    weight = vocabulary_weight(lm)
    hidden = hidden.flatten(0, 1)[real]
    logprobs = linear_logprobs(hidden, weight, labels, temperature)
    out = torch.zeros(mask.numel(), dtype=logprobs.dtype, device=logprobs.device)
    return out.index_copy(0, real, logprobs).view(mask.shape)


@dataclass
class Rollout:
    """Responses of the old policy, and all that PPO needs to learn from them.

    (B, P + T): input_ids, attention_mask. (B,): raw_scores (logits of the reward
    model) and scores (the same normalised). (B, T): the rest. Raises ValueError if
    the shapes disagree, if a response mask is not one run of 1s from the first slot,
    or if a score or another number is not finite.
    """

    input_ids: Tensor
    attention_mask: Tensor
    mask: Tensor
    raw_scores: Tensor
    scores: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    old_values: Tensor
    rewards: Tensor
    advantages: Tensor
    returns: Tensor

    def __post_init__(self):
        batch, width = self.mask.shape
        for field in dataclasses.fields(self):
            shape = tuple(getattr(self, field.name).shape)
            if field.name in ("input_ids", "attention_mask"):
                expected = (batch, *self.input_ids.shape[1:])
            elif field.name in ("raw_scores", "scores"):
                expected = (batch,)
            else:
                expected = (batch, width)
            if shape != expected:
                raise ValueError(f"{field.name} has shape {shape}, expected {expected}")
        mask = self.mask.long()
        broken = (mask[:, 0] != 1) | (mask.diff(dim=1) > 0).any(dim=1)
        if broken.any():
            raise ValueError(
                "each row of a response mask must be a run of 1s and then 0s, got "
                f"{mask[broken][0].tolist()}; take the mask from sample_responses"
            )
        self._check_finite(("scores", "old_logprobs", "ref_logprobs", "old_values"))
        self.host_mask = self.mask.cpu()  # tells lengths without waiting for a GPU

    def __len__(self):
        return len(self.mask)

    def _check_finite(self, names):
        numbers = [getattr(self, name).flatten() for name in names]
        if torch.cat(numbers).isfinite().all():  # one look, for which a GPU is waited
            return
        models = ("reward model", "policy", "reference", "value head of the policy")
        for name, x, model in zip(names, numbers, models, strict=True):
            if not x.isfinite().all():
                bad = x[~x.isfinite()][0].item()
                raise ValueError(
                    f"one of the {name} is {bad}; check the {model} and its inputs, or "
                    "set precision to float32"
                )

    def minibatches(
        self, epochs: int, size: int, generator: torch.Generator
    ) -> list[Tensor]:
        """Indices of the minibatches of all epochs, in a new random order each epoch.

        They are drawn at once and lie in the CPU's memory, so that no minibatch has to
        wait for a GPU.
        """
        device = self.mask.device
        orders = [
            torch.randperm(len(self), generator=generator, device=device)
            for _ in range(epochs)
        ]
        return [part for order in orders for part in order.cpu().split(size)]

    def rows(self, index: Tensor) -> "Rollout":
        """Some of the responses; their checks were made when the rollout was.

        An `index` in the CPU's memory keeps a GPU from being waited for.
        """
        part = copy.copy(self)
        part.host_mask = self.host_mask[index.cpu()]
        index = index.to(self.mask.device, non_blocking=True)
        for field in dataclasses.fields(self):
            setattr(part, field.name, getattr(self, field.name)[index])
        return part


def evaluate_responses(
    policy: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    mask: Tensor,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and values (B, T) of the response tokens under a policy.

    The one forward function of PPO: the old log-probabilities and the new ones both
    come from it, so that their ratio is 1 until the first optimiser step. A mask in
    the CPU's memory (`Rollout.host_mask`) keeps a GPU from being waited for.
    """
    hidden = response_hidden_states(policy.lm, input_ids, attention_mask, mask)
    logprobs = response_logprobs(policy.lm, hidden, input_ids, mask, temperature)
    outside = ~mask.bool().to(hidden.device, non_blocking=True)
    return logprobs, policy.value_head(hidden).masked_fill(outside, 0)


def has_ended(input_ids: Tensor, mask: Tensor, eos_id: int) -> Tensor:
    """Whether each response closes with EOS: (B, P + T), mask (B, T) -> bool (B,)."""
    responses = input_ids[:, -mask.shape[1] :]
    return ((responses == eos_id) & mask.bool()).any(dim=1)


def squash(raw_scores: Tensor) -> Tensor:
    """Raw logits as 2 sigmoid(logit) - 1, between -1 and 1, as reports give them."""
    return 2 * torch.sigmoid(raw_scores) - 1


def normalise_scores(
    raw_scores: Tensor, ended: Tensor, mean: float, std: float, missing_eos_score: float
) -> Tensor:
    """Scores in units of the SFT model's spread, around its mean: all (B,).

    A response without EOS gets `missing_eos_score` whatever the reward model says of
    it: there is no finished text to judge (`lm-human-preferences`; arXiv 2403.17031).
    """
    missing = torch.full_like(raw_scores, missing_eos_score)
    return torch.where(ended, (raw_scores - mean) / std, missing)
