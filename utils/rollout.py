"""Sampling from the policy, and measuring what was sampled."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from utils.models import hidden_states, label_logprobs, vocabulary_logits

# Below this standard deviation, relative to the largest score, scores may differ by
# rounding alone. Small GPT-2s show 1e-7, 1e-4 and 1e-3; deeper ones round more often
ROUNDING = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@torch.no_grad()
def sample_responses(
    lm, prompt_ids, prompt_mask, eos_id, max_new_tokens, temperature=1.0, generator=None
) -> tuple[Tensor, Tensor, Tensor]:
    """Continue left-padded prompts (B, P) until each response ends or is full.

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
    for end in range(width, width + max_new_tokens):
        text = input_ids[rows, start:end], attention_mask[rows, :end]
        last = hidden_states(lm.base_model, *text, cache)[:, -1]
        probs = (vocabulary_logits(lm, last) / temperature).softmax(dim=-1)
        tokens = draw(probs, generator)
        input_ids[rows, end], attention_mask[rows, end] = tokens, 1
        start, alive = end, (tokens != eos_id).nonzero().squeeze(1)
        if len(alive) == 0:
            break
        if len(alive) < len(rows):
            rows = rows[alive]
            cache.batch_select_indices(alive)
    ids, seen = input_ids[:, : end + 1], attention_mask[:, : end + 1]
    return ids, seen, seen[:, width:]


def draw(probs: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One token of each row of probabilities (N, V), like `torch.multinomial`: (N,).

    The probabilities stand end to end on a line; the token is where one random number
    falls. `multinomial` draws a number for each word of the vocabulary instead, which
    takes a CPU longer than the trunk of a small model.
    """
    device, kind = probs.device, torch.float64
    if device.type == "mps":  # a Mac's GPU has no float64
        probs, kind = probs.cpu(), torch.float32
    places = torch.rand((len(probs), 1), generator=generator, dtype=kind, device=device)
    ends = probs.cumsum(dim=-1, dtype=torch.float64)
    places = places.to(ends.device).double() * ends[:, -1:]
    # A row of NaN gives V, one behind the last word; a rollout's check reports the NaN
    found = torch.searchsorted(ends, places, right=True).clamp(max=probs.shape[1] - 1)
    return found.squeeze(1).to(device)


def send(x: Tensor, device: torch.device) -> Tensor:
    """`x.to(device)`; on CUDA, the only device where that is safe, without a wait."""
    return x.to(device, non_blocking=device.type == "cuda")


def response_hidden_states(lm, input_ids, attention_mask, mask) -> Tensor:
    """The hidden states (B, T, d) from which each response token was predicted.

    The response begins at place c of the text and ends at c + T - 1. Its logits, and
    the value before each token, are read one place earlier: at c - 1 ... c + T - 2.
    """
    start = input_ids.shape[1] - mask.shape[1]
    return hidden_states(lm.base_model, input_ids, attention_mask)[:, start - 1 : -1]


def logprobs_from_hidden(lm, hidden, input_ids, mask, temperature=1.0) -> Tensor:
    """Log-probabilities (B, T) of the response tokens; 0 outside the mask.

    `hidden` comes from `response_hidden_states`. The projection to the vocabulary is
    most of the arithmetic, so it is made for real response tokens only.
    """
    # `nonzero` waits for a GPU, unless the mask lies in the CPU's memory
    real = send(mask.flatten().nonzero().squeeze(1), hidden.device)
    labels = input_ids[:, -mask.shape[1] :].flatten()[real]
    logprobs = label_logprobs(lm, hidden.flatten(0, 1)[real], labels, temperature)
    out = torch.zeros(mask.numel(), dtype=logprobs.dtype, device=logprobs.device)
    return out.index_copy(0, real, logprobs).view(mask.shape)


def response_logprobs(lm, input_ids, attention_mask, mask, temperature=1.0) -> Tensor:
    """Log-probabilities (B, T) of the response tokens under a language model."""
    hidden = response_hidden_states(lm, input_ids, attention_mask, mask)
    return logprobs_from_hidden(lm, hidden, input_ids, mask, temperature)


def evaluate_responses(
    policy, input_ids, attention_mask, mask, temperature=1.0
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and values (B, T) of the response tokens under a policy.

    The one forward function of PPO: the old log-probabilities and the new ones both
    come from it, so that their ratio is 1, but for rounding, until the first step.
    """
    hidden = response_hidden_states(policy.lm, input_ids, attention_mask, mask)
    logprobs = logprobs_from_hidden(policy.lm, hidden, input_ids, mask, temperature)
    outside = ~send(mask.bool(), hidden.device)
    return logprobs, policy.value_head(hidden).masked_fill(outside, 0)


def in_pieces(function: Callable, size: int, *tensors: Tensor):
    """What `function(*tensors)` gives, worked out for `size` rows at a time.

    The function returns a tensor, or a tuple of tensors, with a row for each row it
    was given.
    """
    pieces = zip(*(tensor.split(size) for tensor in tensors), strict=True)
    found = [function(*piece) for piece in pieces]
    if isinstance(found[0], tuple):
        return tuple(map(torch.cat, zip(*found, strict=True)))
    return torch.cat(found)


@dataclass
class Batch:
    """Some responses, and what PPO knows of them.

    (B, P + T): input_ids, attention_mask. (B,): raw_scores (logits of the reward
    model) and scores (the same normalised). (B, T): the rest; rewards, advantages and
    returns are filled in later. `cpu_mask` is the mask again, in the CPU's memory: it
    tells how long responses are without a wait for a GPU.
    """

    input_ids: Tensor
    attention_mask: Tensor
    mask: Tensor
    raw_scores: Tensor
    scores: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    old_values: Tensor
    rewards: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None
    cpu_mask: Tensor | None = None

    def __len__(self):
        return len(self.mask)

    @property
    def texts(self) -> tuple[Tensor, Tensor, Tensor]:
        """What a model reads of it: ids, attention mask, response mask."""
        return self.input_ids, self.attention_mask, self.cpu_mask

    @property
    def n_tokens(self) -> Tensor:
        """How many response tokens there are, in the CPU's memory."""
        return self.cpu_mask.sum()

    def rows(self, index: Tensor) -> "Batch":
        """The responses of this index (n,), which costs a wait if it is on a GPU."""
        there = send(index, self.mask.device)
        parts = {**vars(self), "cpu_mask": None}
        parts = {name: x[there] for name, x in parts.items() if x is not None}
        return Batch(**parts, cpu_mask=self.cpu_mask[index.cpu()])

    def split(self, size: int, order: Tensor | None = None) -> Iterator["Batch"]:
        """The responses, at most `size` at a time, in this order or their own."""
        order = torch.arange(len(self)) if order is None else order
        yield from map(self.rows, order.split(size))


@dataclass
class Rollout(Batch):
    """The responses of the old policy to some prompts: a batch that is checked.

    Raises ValueError if the shapes disagree, if a response mask is not one run of 1s
    from the first slot, or if a score or another number is not finite.
    """

    def __post_init__(self):
        self.cpu_mask, text = self.mask.cpu(), tuple(self.input_ids.shape)
        shapes = dict.fromkeys(("raw_scores", "scores"), (len(self),))
        shapes |= {"input_ids": (len(self), *text[1:]), "attention_mask": text}
        for name, x in vars(self).items():
            expected = shapes.get(name, tuple(self.mask.shape))
            if x is not None and tuple(x.shape) != expected:
                raise ValueError(f"{name} has shape {tuple(x.shape)}, not {expected}")
            if x is not None and not x.isfinite().all():
                raise ValueError(
                    f"one of the {name} is {x[~x.isfinite()][0].item()}; check the "
                    "model that it comes from, or set precision to float32"
                )
        mask = self.cpu_mask.long()
        broken = (mask[:, 0] != 1) | (mask.diff(dim=1) > 0).any(dim=1)
        if broken.any():
            raise ValueError(
                "each row of a response mask must be a run of 1s and then 0s, got "
                f"{mask[broken][0].tolist()}; take the mask from sample_responses"
            )


def has_ended(input_ids: Tensor, mask: Tensor, eos_id: int) -> Tensor:
    """Whether each response closes with EOS: (B, P + T), mask (B, T) -> bool (B,)."""
    responses = input_ids[:, -mask.shape[1] :]
    return ((responses == eos_id) & mask.bool()).any(dim=1)


def squash(raw_scores: Tensor) -> Tensor:
    """Raw logits as 2 sigmoid(logit) - 1, between -1 and 1, as reports give them."""
    return 2 * torch.sigmoid(raw_scores) - 1


def response_tokens(input_ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The token ids of each response, EOS included: (B, P + T), mask (B, T)."""
    rows, lengths = input_ids[:, -mask.shape[1] :].tolist(), mask.sum(dim=1).tolist()
    return [row[:n] for row, n in zip(rows, lengths, strict=True)]


def score_scale(raw_scores: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """Mean and standard deviation of raw scores (B,), by which others are normalised.

    `dtype` is the trunk's. Raises ValueError if a score is not finite, or if scores
    differ by rounding alone, which a division by their spread would blow up to ±1.
    """
    mean, std = raw_scores.mean().item(), raw_scores.std().item()
    if not std > ROUNDING[dtype] * raw_scores.abs().max().item():  # true of NaN, too
        raise ValueError(
            f"the reward model says the same to {len(raw_scores)} SFT responses, or no "
            f"number: raw scores around {mean:.3g} with a spread of {std:.0e} in "
            f"{str(dtype).removeprefix('torch.')}; train it on more data, with another "
            "seed or rm_lr, or set precision to float32"
        )
    return mean, std


def normalise_scores(
    raw_scores: Tensor, ended: Tensor, mean: float, std: float, missing_eos_score: float
) -> Tensor:
    """Scores in units of the SFT model's spread, around its mean: all (B,).

    A response without EOS gets `missing_eos_score` whatever the reward model says of
    it: there is no finished text to judge (`lm-human-preferences`; arXiv 2403.17031).
    """
    missing = torch.full_like(raw_scores, missing_eos_score)
    return torch.where(ended, (raw_scores - mean) / std, missing)
