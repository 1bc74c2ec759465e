"""Sampling from the policy, and measuring what was sampled."""

import copy
import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from utils.models import hidden_states, position_ids, vocabulary_logits
from utils.ppo import token_logprobs


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
    pi_old is what was sampled. Keys and values are cached: each step runs one token.
    """
    input_ids, attention_mask = prompt_ids, prompt_mask
    step_ids, cache = prompt_ids, None
    alive = torch.ones(len(prompt_ids), dtype=torch.bool, device=prompt_ids.device)
    for _ in range(max_new_tokens):
        output = lm.base_model(
            input_ids=step_ids,
            attention_mask=attention_mask,
            position_ids=position_ids(attention_mask)[:, -step_ids.shape[1] :],
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        # Finished rows are filled with EOS; only the others are projected and drawn
        logits = vocabulary_logits(lm, output.last_hidden_state[alive, -1])
        probs = torch.softmax(logits / temperature, dim=-1)
        step_ids = torch.full_like(alive, eos_id, dtype=torch.long).unsqueeze(1)
        step_ids[alive] = torch.multinomial(probs, 1, generator=generator)
        input_ids = torch.cat([input_ids, step_ids], dim=1)
        attention_mask = torch.cat([attention_mask, alive.long().unsqueeze(1)], dim=1)
        alive = alive & (step_ids.squeeze(1) != eos_id)
        if not alive.any():
            break
    return input_ids, attention_mask, attention_mask[:, prompt_ids.shape[1] :]


def response_hidden_states(
    lm: nn.Module, input_ids: Tensor, attention_mask: Tensor, mask: Tensor
) -> Tensor:
    """The hidden states (B, T, d) from which each response token was predicted.

    The response stands at c ... c + T - 1 of the text, so its logits, and the value
    before each token is chosen, are read one place earlier: at c - 1 ... c + T - 2.
    """
    start = input_ids.shape[1] - mask.shape[1]
    return hidden_states(lm.base_model, input_ids, attention_mask)[:, start - 1 : -1]


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
    real = mask.bool()
    labels = input_ids[:, -mask.shape[1] :][real]
    logits = vocabulary_logits(lm, hidden[real])
    out = torch.zeros(mask.shape, dtype=logits.dtype, device=logits.device)
    return out.masked_scatter(real, token_logprobs(logits, labels, temperature))


@dataclass
class Rollout:
    """Responses of the old policy, and all that PPO needs to learn from them.

    (B, P + T): input_ids, attention_mask. (B,): raw_scores (logits of the reward
    model) and scores (the same normalised). (B, T): the rest. Raises ValueError if
    the shapes disagree, if a response mask is not one run of 1s from the first slot,
    or if a score is not finite.
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
        if not self.scores.isfinite().all():
            bad = self.scores[~self.scores.isfinite()][0].item()
            raise ValueError(f"a score is {bad}; check the reward model and its inputs")

    def __len__(self):
        return len(self.mask)

    def rows(self, index) -> "Rollout":
        """Some of the responses; their checks were made when the rollout was."""
        part = copy.copy(self)
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
    come from it, so that their ratio is 1 until the first optimiser step.
    """
    hidden = response_hidden_states(policy.lm, input_ids, attention_mask, mask)
    logprobs = response_logprobs(policy.lm, hidden, input_ids, mask, temperature)
    return logprobs, policy.value_head(hidden).masked_fill(~mask.bool(), 0)


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
