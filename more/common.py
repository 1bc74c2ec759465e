"""What several lessons of this folder share: notebook 3, statistics, files."""

import contextlib
import io
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from scipy.stats import t
from torch import Tensor

from practice.cells import LOOP, import_cells
from utils.runs import NOTEBOOKS

# Of notebook 3: its models, prompts and scores, its loop, and its judges
SERIES = ("load", "prompts", "prompts-of", "batch", "score", "score-function")
SERIES += (*LOOP, "judges", "evaluate")


def notebook_3(settings, device) -> SimpleNamespace:
    """Models, prompts, scores, loop and judges of notebook 3, as its file defines them.

    What those cells print has been seen there, so it is not printed again.
    """
    names = {"settings": settings, "device": device}
    with contextlib.redirect_stdout(io.StringIO()):
        return SimpleNamespace(**import_cells(NOTEBOOKS["3"], *SERIES, names=names))


def best_of_n(logprobs: Tensor, scores: Tensor, n: int) -> Tensor:
    """Log-probabilities (..., K) of K responses after best-of-n.

    Of n responses drawn from a policy, that with the highest score is kept; among
    equal scores chance decides. With F(s) the policy's chance of a score of at most s,
    F(s-) of one below s, and p(s) = F(s) - F(s-),

        pi_n(y) = pi(y) / p(R(y)) * (F(R(y))^n - F(R(y)-)^n)

    (Beirami et al. 2024, arXiv 2401.01879, where no two scores are equal). `logprobs`
    (..., K) and `scores` are those of all responses; or of a sample, each with -log K.
    Raises ValueError if n is below 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}; 1 is the policy itself")
    mine, others = scores.unsqueeze(-1), scores.unsqueeze(-2)
    each = logprobs.double().unsqueeze(-2)

    def log_chance(which):
        return each.masked_fill(~which, -math.inf).logsumexp(dim=-1)

    up_to, below = log_chance(others <= mine), log_chance(others < mine)
    # log(F^n - F-^n), where the powers alone might be too small for a float
    kept = n * up_to + (-torch.expm1(n * (below - up_to))).log()
    return logprobs + kept - log_chance(others == mine)


def interval_95(runs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over runs (n, ...), and half the width of its 95 % interval.

    t s / sqrt(n), with the deviation s of the sample and t of Student's distribution
    (Student 1908, "The Probable Error of a Mean"). Raises ValueError for fewer than 2
    runs.
    """
    if (n := len(runs)) < 2:
        raise ValueError(f"an interval takes 2 runs or more, got {n}")
    return runs.mean(dim=0), float(t.ppf(0.975, n - 1)) * runs.std(dim=0) / n**0.5


def write_text(path: Path, text: str):
    """Write a file as a whole: whoever reads it finds the old text or the new one."""
    beside = Path(path).with_name(f"{Path(path).name}.unfinished")
    beside.write_text(text, encoding="utf8")
    os.replace(beside, path)


def check_group(name: str, group_size: int, settings):
    """ValueError if an estimator cannot be trained with groups of this size.

    A rollout must be made of whole groups; and GRPO's mean over the responses of a
    minibatch is no sum of the means over its pieces.
    """
    rollout, minibatch = settings.ppo_rollout_size, settings.ppo_minibatch_size
    if group_size < 1 or rollout % group_size:
        raise ValueError(
            f"ppo_rollout_size ({rollout}) must be a multiple of the group, got "
            f"{group_size}"
        )
    if name == "GRPO" and settings.ppo_micro_batch_size < minibatch:
        raise ValueError(
            "GRPO's mean over responses cannot be worked out in pieces; set "
            f"ppo_micro_batch_size ({settings.ppo_micro_batch_size}) to "
            f"ppo_minibatch_size ({minibatch}), or lower both"
        )


def best_possible(scores: Tensor, kl_coef: float) -> tuple[Tensor, dict]:
    """The best policy at a price of KL, estimated from the reference's responses.

    `scores` (P, K): those of K responses of the reference to each of P prompts. The
    best policy is in proportion to pi_ref * exp(R / beta), so the i-th response gets
    w_i = softmax(R / beta)_i of it, and 1 / K of the reference (Rafailov et al. 2023,
    arXiv 2305.18290, equation 4; importance sampling, normalised by itself). Returns
    the weights w (P, K), and means over the prompts:

        score = sum_i w_i R_i        kl = sum_i w_i log(K w_i)  [nats per response]
        objective = score - beta kl = beta log mean_i exp(R_i / beta)

    K responses show no KL above log K; where the estimate comes near that, take more.
    Raises ValueError if beta is not above 0.
    """
    if kl_coef <= 0:
        raise ValueError(
            f"kl_coef must be above 0, got {kl_coef}; without a price take best-of-n"
        )
    logs = (scores.double() / kl_coef).log_softmax(dim=1)
    weights = logs.exp()
    score = (weights * scores).sum(dim=1).mean().item()
    kl = (weights * (logs + math.log(scores.shape[1]))).sum(dim=1).mean().item()
    return weights, {"score": score, "kl": kl, "objective": score - kl_coef * kl}


def peak_memory(device) -> float:
    """The most memory that this process (on a GPU: its tensors) ever held, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    import resource  # which Windows does not have

    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, else KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
