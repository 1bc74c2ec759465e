"""The mathematics of REINFORCE, RLOO and GRPO, on tensors.

Each of them has one number for a whole response, where PPO has one for each token.
Scores are (B,). Where a function compares the responses to one prompt, groups stand
together: with k = `group_size`, rows 0 ... k - 1 answer the first prompt, the next k
the second. Token-shaped tensors, masks and errors are those of `ppo.py`.

Sources: Williams 1992, "Simple Statistical Gradient-Following Algorithms for
Connectionist Reinforcement Learning"; Ahmadian et al. 2024, "Back to Basics" (arXiv
2402.14740), for RLOO; Shao et al. 2024, "DeepSeekMath" (arXiv 2402.03300), for GRPO;
Liu et al. 2025, "Understanding R1-Zero-Like Training" (arXiv 2503.20783), for what its
divisions do.
"""

import torch
from torch import Tensor

from utils.ppo import check_shapes, kl_estimate, masked_mean, policy_loss

STD_FLOOR = 1e-4  # added to the spread of a group, so that equal scores divide by it


def _groups(scores: Tensor, group_size: int) -> Tensor:
    """Scores (B,) as (B / k, k); ValueError if that does not go."""
    if group_size < 2 or scores.ndim != 1 or len(scores) % group_size:
        raise ValueError(
            f"scores {tuple(scores.shape)} are not groups of {group_size}; sample 2 or "
            "more responses to each prompt, one group after the other"
        )
    return scores.view(-1, group_size)


@torch.no_grad()
def reinforce_advantages(scores: Tensor, baseline: float | Tensor = 0.0) -> Tensor:
    """R_i - b: scores (B,) -> (B,).

    Right on average for every b that does not depend on the response itself, such as
    a mean of earlier scores; the variance does depend on b. Williams 1992, section 4.
    """
    return scores - baseline


@torch.no_grad()
def rloo_advantages(scores: Tensor, group_size: int) -> Tensor:
    """A_i = R_i - mean of the other k - 1 scores of its group: (B,) -> (B,).

    The others do not depend on this response, so the gradient is right on average; the
    group's own mean as baseline would shrink it by (k - 1) / k. arXiv 2402.14740,
    section 3.3. Raises ValueError if k < 2 or the scores are not whole groups.
    """
    groups = _groups(scores, group_size)
    others = (groups.sum(dim=1, keepdim=True) - groups) / (group_size - 1)
    return (groups - others).flatten()


@torch.no_grad()
def grpo_advantages(scores: Tensor, group_size: int, scale: bool = True) -> Tensor:
    """A_i = (R_i - mean) / std, both of its group: (B,) -> (B,).

    The std is that of the sample (divided by k - 1), with 1e-4 added, so that equal
    scores give 0. `scale=False` leaves the division out: it gives prompts whose
    responses hardly differ the same weight as all others. arXiv 2402.03300, section
    4.1.2; arXiv 2503.20783. Raises ValueError if k < 2 or the scores are not whole
    groups.
    """
    groups = _groups(scores, group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    if scale:
        centred = centred / (groups.std(dim=1, keepdim=True) + STD_FLOOR)
    return centred.flatten()


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_range: float = 0.2,
    kl_coef: float = 0.04,
    mean: str = "response",
) -> tuple[Tensor, dict[str, Tensor]]:
    """GRPO's loss: PPO's clipped surrogate, and the price of the KL beside it.

    loss = mean of max(-A rho, -A clip(rho, 1 - eps, 1 + eps)) + beta k3

    with k3 of pi_theta against pi_ref. advantages (B,), one for all tokens of its
    response; the rest (B, T) -> scalar loss, and the stats of `policy_loss` with `k3`,
    the mean of k3. `mean="response"`: over the tokens of each response, and then over
    the responses, so that a token of a long one counts less (arXiv 2402.03300, equation
    3); "token": over all tokens alike. Raises ValueError for another mean, or if the
    shapes disagree.
    """
    if mean not in ("response", "token"):
        raise ValueError(f"mean must be response or token, got {mean!r}")
    check_shapes(ref_logprobs=ref_logprobs, mask=mask)
    check_shapes(**{"advantages": advantages, "mask without T": mask[:, 0]})
    # A weight on the advantage is one on the token's loss: both branches have it
    lengths = mask.sum(dim=1, keepdim=True).clamp(min=1)
    weights = torch.ones_like(advantages).unsqueeze(1)
    if mean == "response":
        weights = lengths.to(weights.dtype).mean() / lengths
    weighted = (advantages.unsqueeze(1) * weights).expand(mask.shape)
    loss, stats = policy_loss(logprobs, old_logprobs, weighted, mask, clip_range)
    # Replaced before the arithmetic, as in ppo.py
    inside = mask.bool()
    new, ref = (x.masked_fill(~inside, 0) for x in (logprobs, ref_logprobs))
    k3 = kl_estimate(new, ref, "k3")
    loss = loss + kl_coef * masked_mean(k3 * weights, mask)
    return loss, {**stats, "k3": masked_mean(k3.detach(), mask)}
