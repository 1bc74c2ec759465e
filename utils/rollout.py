"""Sampling from the policy, and measuring what was sampled."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from utils.fast import draw_tokens, hidden_states_by_length, linear_logprobs, send
from utils.models import (
    next_hidden_states,
    position_ids,
    vocabulary_weight,
)
from utils.processes import from_the_first

# Spread of scores, relative to the largest, that may be rounding: some ten times what
# small GPT-2s show or more (1e-7, 1e-4 and 1e-3), since deeper ones round more often
ROUNDING = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


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
    for end in range(width, width + max_new_tokens):
        text = input_ids[rows, :end], attention_mask[rows, :end]
        hidden = next_hidden_states(lm.base_model, *text, start, cache)[:, -1]
        tokens = draw_tokens(hidden, vocabulary_weight(lm), temperature, generator)
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
    positions, ends = position_ids(attention_mask), start + mask.sum(dim=1)
    hidden = hidden_states_by_length(
        lm.base_model, input_ids, attention_mask, positions, ends
    )
    return hidden[:, start - 1 : -1]


def logprobs_from_hidden(
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
    real = send(mask.flatten().nonzero().squeeze(1), hidden.device)
    labels = input_ids[:, -mask.shape[1] :].flatten()[real]
    weight = vocabulary_weight(lm)
    hidden = hidden.flatten(0, 1)[real]
    logprobs = linear_logprobs(hidden, weight, labels, temperature)
    out = torch.zeros(mask.numel(), dtype=logprobs.dtype, device=logprobs.device)
    return out.index_copy(0, real, logprobs).view(mask.shape)


def response_logprobs(
    lm: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    mask: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """Log-probabilities (B, T) of the response tokens under a language model."""
    hidden = response_hidden_states(lm, input_ids, attention_mask, mask)
    return logprobs_from_hidden(lm, hidden, input_ids, mask, temperature)


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
    model) and scores (the same normalised). (B, T): the rest, of which rewards,
    advantages and returns come after the others. `cpu_mask` is the mask again, in the
    CPU's memory: it tells how long responses are without a wait for a GPU.
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
    def lengths(self) -> Tensor:
        """How many response tokens each row has (B,), in the CPU's memory."""
        return self.cpu_mask.sum(dim=1)

    @property
    def n_tokens(self) -> Tensor:
        """How many response tokens there are, in the CPU's memory."""
        return self.cpu_mask.sum()

    def to(self, device) -> "Batch":
        """The same on another device."""
        parts = {name: x.to(device) for name, x in _tensors(self) if name != "cpu_mask"}
        return type(self)(**parts, cpu_mask=self.cpu_mask)

    def rows(self, index: Tensor) -> "Batch":
        """The responses of this index, best in the CPU's memory."""
        there = send(index, self.mask.device)
        parts = {name: x[there] for name, x in _tensors(self) if name != "cpu_mask"}
        return Batch(**parts, cpu_mask=self.cpu_mask[index.cpu()])

    def pieces(self, size: int) -> Iterator["Batch"]:
        """The same responses, at most `size` at a time."""
        for index in torch.arange(len(self)).split(size):
            yield self if len(index) == len(self) else self.rows(index)


def _tensors(batch):
    return [(name, x) for name, x in vars(batch).items() if x is not None]


@dataclass
class Rollout(Batch):
    """The responses of the old policy to some prompts: a batch that was looked at.

    Raises ValueError if the shapes disagree, if a response mask is not one run of 1s
    from the first slot, or if a score or another number is not finite.
    """

    def __post_init__(self):
        batch, width = self.mask.shape
        shapes = {"input_ids": (batch, *self.input_ids.shape[1:])}
        shapes |= {"attention_mask": shapes["input_ids"]}
        shapes |= {"raw_scores": (batch,), "scores": (batch,)}
        for name, x in _tensors(self):
            expected = shapes.get(name, (batch, width))
            if tuple(x.shape) != expected:
                raise ValueError(
                    f"{name} has shape {tuple(x.shape)}, expected {expected}"
                )
        mask = self.mask.long()
        broken = (mask[:, 0] != 1) | (mask.diff(dim=1) > 0).any(dim=1)
        if broken.any():
            raise ValueError(
                "each row of a response mask must be a run of 1s and then 0s, got "
                f"{mask[broken][0].tolist()}; take the mask from sample_responses"
            )
        self._check_finite()
        self.cpu_mask = self.mask.cpu()

    @classmethod
    def joined(cls, parts: list[Batch]) -> "Rollout":
        """The rows of some batches, in order, as one rollout.

        Prompts are padded on the left and responses on the right, to the longest.
        """
        parts = [part for part in parts if len(part)]
        prompts = [p.input_ids.shape[1] - p.mask.shape[1] for p in parts]
        responses = [p.mask.shape[1] for p in parts]
        padding = torch.cat([p.input_ids[~p.attention_mask.bool()] for p in parts])
        filler = padding[0].item() if len(padding) else 0
        columns = {name: [] for name, _ in _tensors(parts[0])}
        for part, prompt, response in zip(parts, prompts, responses, strict=True):
            for name, x in _tensors(part):
                whole = name in ("input_ids", "attention_mask")
                room = (max(prompts) - prompt) * whole, max(responses) - response
                if x.dim() == 2:
                    x = F.pad(x, room, value=filler if name == "input_ids" else 0)
                columns[name].append(x)
        return cls(**{name: torch.cat(pieces) for name, pieces in columns.items()})

    def _check_finite(self):
        made_by = {
            "scores": "reward model",
            "old_logprobs": "policy",
            "ref_logprobs": "reference",
            "old_values": "value head of the policy",
            "advantages": "function that makes the advantages",
        }
        found = {name: x for name, x in _tensors(self) if name in made_by}
        # One question for all of them: each answer is a wait for a GPU
        if torch.cat([x.flatten() for x in found.values()]).isfinite().all():
            return
        for name, x in found.items():
            if not x.isfinite().all():
                bad = x[~x.isfinite()][0].item()
                raise ValueError(
                    f"one of the {name} is {bad}; check the {made_by[name]} and its "
                    "inputs, or set precision to float32"
                )

    def minibatches(
        self, epochs: int, size: int, generator: torch.Generator
    ) -> Iterator[Batch]:
        """The minibatches of all epochs, in a new random order each epoch.

        The orders are drawn at the first one, and lie in the CPU's memory.
        """
        device = self.mask.device
        orders = [
            torch.randperm(len(self), generator=generator, device=device)
            for _ in range(epochs)
        ]
        for order in orders:
            for index in order.cpu().split(size):
                yield self.rows(index)


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

    `dtype` is the trunk's. Raises ValueError if a score is not finite, or if they
    differ by their rounding only: divided by that, it would become scores of ±1.
    """
    n, off = len(raw_scores), raw_scores[~raw_scores.isfinite()]
    if len(off):
        raise ValueError(
            f"the reward model gives {len(off)} of {n} SFT responses no finite score "
            f"({off[0].item()}); set precision to float32, or train it again"
        )
    mean, std = from_the_first((raw_scores.mean().item(), raw_scores.std().item()))
    largest = raw_scores.abs().max().item()
    if not std > ROUNDING[dtype] * largest:  # NaN, if there is only one
        raise ValueError(
            f"the reward model says the same to {n} SFT responses: raw scores around "
            f"{mean:.3g} with a spread of {std:.0e}, which is rounding in "
            f"{str(dtype).removeprefix('torch.')}; train it on more data, with another "
            "seed or rm_lr"
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
