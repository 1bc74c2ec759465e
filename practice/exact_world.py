"""A world so small that the best policy, its objective and all values are exact.

Three words, one of them EOS, and responses of at most three tokens: fifteen in all,
so that a mean over responses is a sum over fifteen numbers. The objective of PPO with
a KL penalty is J(pi) = E_pi[R] - beta * KL(pi || pi_ref), in units of the score.
"""

import dataclasses

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from utils.models import freeze
from utils.rollout import has_ended, response_logprobs
from utils.settings import TINY

WORDS, EOS, LENGTH = ("EOS", "a", "b"), 0, 3
PROMPT = [EOS]  # like a text of GPT-2 that begins with its only special token
# How PPO learns here: as in the tiny preset, but a model this small takes larger steps.
# Eight of the fifteen responses have no EOS, so that is no worse here than a bad one.
# They are kept short by a narrow clip and a bound: at the optimum every response is as
# good as any other, whitening blows the noise that is left up to full size, and a step
# too far takes a good response to where it is never sampled again.
SETTINGS = dataclasses.replace(
    TINY,
    max_new_tokens=LENGTH,
    missing_eos_score=-1.0,
    ppo_lr=3e-3,
    ppo_warmup=0,
    value_head_lr=2e-2,
    clip_range=0.05,
    max_approx_kl=0.1,
)


def all_responses() -> tuple[Tensor, Tensor]:
    """Every response as ids (15, 3), filled up with EOS, and the mask (15, 3)."""
    ended, open_ended = [], [[]]
    for _ in range(LENGTH):
        ended += [words + [EOS] for words in open_ended]
        open_ended = [words + [word] for words in open_ended for word in (1, 2)]
    texts = ended + open_ended
    ids = torch.tensor([text + [EOS] * (LENGTH - len(text)) for text in texts])
    lengths = torch.tensor([len(text) for text in texts])
    return ids, (torch.arange(LENGTH) < lengths[:, None]).long()


class ExactWorld:
    """A reference policy, and a score for each of the fifteen responses.

    The reference is a one-layer GPT-2 with random weights. The scores are drawn from
    N(0, 1), but for the eight responses without EOS, which get the settings'
    `missing_eos_score`.
    """

    def __init__(self, seed: int = 0):
        self.seed = seed
        sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": LENGTH + 1}
        ids = {"vocab_size": len(WORDS), "bos_token_id": EOS, "eos_token_id": EOS}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            config = GPT2Config(**sizes, **ids, tie_word_embeddings=False)
            self.reference = freeze(GPT2LMHeadModel(config))
            # With GPT-2's own start every word would be about equally likely
            torch.nn.init.normal_(self.reference.lm_head.weight, std=0.1)
            scores = torch.randn(15)
        self.responses, self.mask = all_responses()
        prompts = torch.tensor(PROMPT).expand(len(self.responses), -1)
        self.input_ids = torch.cat([prompts, self.responses], dim=1)
        self.attention_mask = torch.cat([torch.ones_like(prompts), self.mask], dim=1)
        ended = has_ended(self.input_ids, self.mask, EOS)
        self.scores = torch.where(ended, scores, SETTINGS.missing_eos_score)

    def score(self, input_ids, attention_mask, mask) -> tuple[Tensor, Tensor]:
        """The scores (B,) of sampled responses, as raw and as normalised ones."""
        rows = input_ids[:, -mask.shape[1] :].masked_fill(mask == 0, EOS)
        rows = torch.nn.functional.pad(rows, (0, LENGTH - mask.shape[1]), value=EOS)
        same = (rows[:, None] == self.responses).all(dim=2)
        scores = self.scores[same.long().argmax(dim=1)]
        return scores, scores

    def token_logprobs(self, lm) -> Tensor:
        """Log-probabilities (15, 3) of the tokens of all responses, float64."""
        batch = (self.input_ids, self.attention_mask, self.mask)
        return response_logprobs(lm, *batch).double()

    def logprobs(self, lm) -> Tensor:
        """Log-probabilities (15,) of all responses."""
        return self.token_logprobs(lm).sum(dim=1)

    def objective(self, logprobs: Tensor, kl_coef: float) -> Tensor:
        """J of a policy with these log-probabilities (15,): a sum over all responses.

        Ziegler et al. 2019 (arXiv 1909.08593), equation 2.
        """
        kl = logprobs - self.logprobs(self.reference)
        return (logprobs.exp() * (self.scores - kl_coef * kl)).sum()

    def optimum(self, kl_coef: float) -> tuple[Tensor, Tensor]:
        """The log-probabilities (15,) of the best policy pi*, and its objective J*.

        pi* is in proportion to pi_ref * exp(R / beta), and J* is
        beta * log E_ref[exp(R / beta)]: Rafailov et al. 2023 (arXiv 2305.18290),
        equation 4 and appendix A.1.
        """
        weights = self.logprobs(self.reference) + self.scores.double() / kl_coef
        log_total = torch.logsumexp(weights, dim=0)
        return weights - log_total, kl_coef * log_total

    def values(self, lm, kl_coef: float) -> Tensor:
        """What is still to come before each token on average, (15, 3), with gamma 1.

        The mean of the rewards from there on over all responses that begin alike.
        """
        logprobs = self.token_logprobs(lm)
        kl = logprobs - self.token_logprobs(self.reference)
        last = self.mask.cumsum(dim=1) == self.mask.sum(dim=1, keepdim=True)
        rewards = (self.scores[:, None] * last - kl_coef * kl) * self.mask
        to_come = rewards.flip(1).cumsum(dim=1).flip(1)
        probs, values = logprobs.sum(dim=1).exp(), torch.zeros_like(to_come)
        for t in range(LENGTH):
            begin, here = self.responses[:, :t], self.mask[:, t].bool()
            weights = ((begin[:, None] == begin).all(dim=2) & here) * probs
            mean = (weights @ to_come[:, t]) / weights.sum(dim=1)
            values[:, t] = torch.where(here, mean, 0.0)
        return values

    def reached(self, lm, kl_coef: float) -> float:
        """(J - J_ref) / (J* - J_ref): 0 for the reference, 1 for the best policy."""
        with torch.no_grad():
            start = self.objective(self.logprobs(self.reference), kl_coef)
            gain = self.objective(self.logprobs(lm), kl_coef) - start
            return (gain / (self.optimum(kl_coef)[1] - start)).item()

    def names(self) -> list[str]:
        """The fifteen responses as text; one without EOS ends in dots."""
        rows = zip(self.responses.tolist(), self.mask.sum(dim=1).tolist(), strict=True)
        texts = [" ".join(WORDS[word] for word in row[:n]) for row, n in rows]
        return [text if text.endswith("EOS") else f"{text} …" for text in texts]
