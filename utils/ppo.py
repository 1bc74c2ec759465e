"""The mathematics of PPO for language models, on tensors.

Shapes: B responses of at most T tokens, V words in the vocabulary. A `mask` is
(B, T), 1 on the tokens of the response up to and including its end-of-sequence
token, else 0; bool, integer or float. Log-probabilities and KL are in nats. What lies
outside the mask reaches no result and no gradient, not even NaN or inf, because
it is replaced before the arithmetic. Shapes that disagree raise `ValueError`.

Sources: Schulman et al. 2016, "High-Dimensional Continuous Control Using
Generalized Advantage Estimation" (arXiv 1506.02438); Schulman et al. 2017,
"Proximal Policy Optimization Algorithms" (arXiv 1707.06347); Ziegler et al. 2019,
"Fine-Tuning Language Models from Human Preferences" (arXiv 1909.08593) and its
code, `lm-human-preferences`; Schulman 2020, "Approximating KL Divergence"
(joschu.net/blog/kl-approx.html).
"""

import torch
from torch import Tensor


def check_shapes(**tensors: Tensor):
    """Raise ValueError, with all shapes, unless these tensors have the same shape."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"these must have the same shape: {listed}")


def _inside(x: Tensor, mask: Tensor) -> Tensor:
    """x where the mask is 1, else 0: also stops gradients, NaN and inf."""
    return torch.where(mask.bool(), x, torch.zeros((), dtype=x.dtype, device=x.device))


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is that."""
    return x if x.dtype == torch.float64 else x.float()


def token_logprobs(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each label under softmax(logits / temperature).

    logits (..., V), labels (...) -> (...), in nats. The arithmetic is at least
    float32: half-precision logits near -100 are spaced 0.06 (float16) or 0.5
    (bfloat16) apart, more than PPO's clip range. Raises ValueError if the shapes
    disagree or the temperature is not positive.
    """
    check_shapes(**{"logits without V": logits[..., 0], "labels": labels})
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    logits = at_least_float32(logits)
    if temperature != 1:  # a division by 1 would copy (B, T, V) numbers
        logits = logits / temperature
    logprobs = torch.log_softmax(logits, dim=-1)
    return logprobs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x (B, T) over the tokens where the mask is 1 -> scalar."""
    check_shapes(x=x, mask=mask)
    return _inside(x, mask).sum() / mask.sum().clamp(min=1)


def masked_var(x: Tensor, mask: Tensor) -> Tensor:
    """Population variance (divided by n) of x (B, T) over the mask -> scalar."""
    mean = masked_mean(x, mask)
    return masked_mean((_inside(x, mask) - mean) ** 2, mask)


def masked_whiten(x: Tensor, mask: Tensor) -> Tensor:
    """x (B, T) shifted and scaled to mean 0 and variance 1 over the mask -> (B, T).

    0 outside the mask. Huang et al. 2022, "The 37 Implementation Details of Proximal
    Policy Optimization", core detail 7 (there over each minibatch).
    """
    mean, var = masked_mean(x, mask), masked_var(x, mask)
    return _inside((_inside(x, mask) - mean) * torch.rsqrt(var + 1e-8), mask)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str = "k1") -> Tensor:
    """Per-token estimate of KL(pi || pi_ref) from tokens sampled from pi.

    logprobs, ref_logprobs (B, T) -> (B, T), in nats. With l = log pi - log pi_ref:
    k1 = l (unbiased, can be negative), k2 = l^2 / 2 (biased, never negative),
    k3 = exp(-l) - 1 + l (unbiased, never negative). Schulman 2020. Raises
    ValueError if the shapes disagree or the kind is not k1, k2 or k3.
    """
    check_shapes(logprobs=logprobs, ref_logprobs=ref_logprobs)
    log_ratio = logprobs - ref_logprobs
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return log_ratio**2 / 2
    if kind == "k3":
        return torch.expm1(-log_ratio) + log_ratio
    raise ValueError(
        f"kind must be k1, k2 or k3, got {kind!r} (shape {tuple(logprobs.shape)})"
    )


@torch.no_grad()
def token_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kl_coef: float
) -> Tensor:
    """The reward of each token: a KL penalty, plus the score on the last real one.

    r_t = -kl_coef * (log pi_old - log pi_ref) + [t is the last real token] * score

    scores (B,), the rest (B, T) -> (B, T), 0 outside the mask. Ziegler et al. 2019,
    equation 2, spread over the tokens as in their code. Raises ValueError if the
    shapes disagree.
    """
    check_shapes(logprobs=logprobs, ref_logprobs=ref_logprobs, mask=mask)
    check_shapes(**{"scores": scores, "mask without T": mask[:, 0]})
    mask = mask.bool()
    followed = torch.nn.functional.pad(mask[:, 1:], (0, 1), value=False)
    is_last = mask & ~followed
    kl = kl_estimate(_inside(logprobs, mask), _inside(ref_logprobs, mask), kind="k1")
    return -kl_coef * kl + _inside(scores.unsqueeze(1).expand_as(kl), is_last)


@torch.no_grad()
def compute_gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, from the last token back to the first.

    delta_t = r_t + gamma * V_{t+1} - V_t,  with V = 0 after the last real token
    A_t     = delta_t + gamma * lam * A_{t+1}
    G_t     = A_t + V_t

    rewards, values (B, T) -> advantages, returns (B, T), 0 outside the mask. The
    advantages are not whitened: returns made of whitened advantages would teach the
    value head numbers in the wrong units. arXiv 1506.02438, equations 11 to 16.
    Raises ValueError if the shapes disagree.
    """
    check_shapes(rewards=rewards, values=values, mask=mask)
    rewards, values, mask = _inside(rewards, mask), _inside(values, mask), mask.bool()
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = _inside(delta + gamma * lam * next_advantage, mask[:, t])
        advantages[:, t] = advantage
        next_value, next_advantage = values[:, t], advantage
    return advantages, advantages + values


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_range: float = 0.2,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate, as a loss to minimise.

    rho_t = pi_theta / pi_old = exp(logprobs - old_logprobs)
    loss  = mean over the mask of max(-A rho, -A clip(rho, 1 - eps, 1 + eps))

    All (B, T) -> scalar loss, and detached scalar stats: `approx_kl` (mean k3 of
    pi_old against pi_theta), `clip_fraction` (share of tokens where the clipped
    branch is the larger loss), `ratio_mean`, `ratio_max`. arXiv 1707.06347,
    equation 7 with the sign turned. Raises ValueError if the shapes disagree.
    """
    check_shapes(
        logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask
    )
    logprobs, old_logprobs = _inside(logprobs, mask), _inside(old_logprobs, mask)
    advantages = _inside(advantages, mask)
    ratio = torch.exp(logprobs - old_logprobs)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = masked_mean(torch.maximum(unclipped, clipped), mask)
    with torch.no_grad():
        stats = {
            "approx_kl": masked_mean(kl_estimate(old_logprobs, logprobs, "k3"), mask),
            "clip_fraction": masked_mean((clipped > unclipped).to(ratio.dtype), mask),
            "ratio_mean": masked_mean(ratio, mask),
            "ratio_max": _inside(ratio, mask).max(),
        }
    return loss, stats


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip_range: float = 0.2,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Half the squared error of the value head, clipped around its old values.

    V_clip = V_old + clip(V - V_old, -eps, +eps)
    loss   = 1/2 mean over the mask of max((V - G)^2, (V_clip - G)^2)

    All (B, T) -> scalar loss, and the detached stat `value_clip_fraction` (share of
    tokens where the clipped error is the larger). `lm-human-preferences`,
    train_policy.py. Raises ValueError if the shapes disagree.
    """
    check_shapes(values=values, old_values=old_values, returns=returns, mask=mask)
    values, old_values = _inside(values, mask), _inside(old_values, mask)
    returns = _inside(returns, mask)
    # Clamped directly: V_old + (V - V_old) would differ from V by rounding
    near_old = values.clamp(old_values - clip_range, old_values + clip_range)
    error, clipped_error = (values - returns) ** 2, (near_old - returns) ** 2
    loss = 0.5 * masked_mean(torch.maximum(error, clipped_error), mask)
    with torch.no_grad():
        fraction = masked_mean((clipped_error > error).to(values.dtype), mask)
    return loss, {"value_clip_fraction": fraction}


def entropy(logits: Tensor, mask: Tensor) -> Tensor:
    """Mean entropy of the next-token distributions, -sum_v p_v log p_v, in nats.

    logits (B, T, V), mask (B, T) -> scalar: 0 for a certain choice, log V for a
    uniform one. Raises ValueError if the shapes disagree.
    """
    check_shapes(**{"logits without V": logits[..., 0], "mask": mask})
    logits = at_least_float32(_inside(logits, mask.unsqueeze(-1)))
    logprobs = torch.log_softmax(logits, dim=-1)
    probs = logprobs.exp()
    # Where p is 0, p log p is 0 too, and so is its gradient
    return masked_mean(-(probs * logprobs.masked_fill(probs == 0, 0)).sum(-1), mask)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var[G - V] / Var[G] over the mask: how much of the returns V foresees.

    All (B, T) -> scalar: 1 is perfect, 0 no better than a constant, below 0 worse;
    0 where the returns do not vary. Raises ValueError if the shapes disagree.
    """
    check_shapes(values=values, returns=returns, mask=mask)
    unexplained = masked_var(_inside(returns, mask) - _inside(values, mask), mask)
    total = masked_var(returns, mask)
    # Equal returns leave a variance of rounding errors, not of exactly 0.
    varies = total > 1e-10 * masked_mean(_inside(returns, mask) ** 2, mask)
    share = 1 - unexplained / torch.where(varies, total, torch.ones_like(total))
    return torch.where(varies, share, torch.zeros_like(share))


class AdaptiveKL:
    """A KL coefficient that steers the measured KL to a target.

    beta <- beta * (1 + clip(KL / target - 1, -0.2, 0.2) * n / horizon), where KL is
    the mean over responses of the summed k1 (nats), n the episodes since the last
    update and the horizon is in episodes. Ziegler et al. 2019, section 2.2, with n /
    horizon for their K, as in their code. Raises ValueError unless kl_coef, target and
    horizon are positive.
    """

    def __init__(self, kl_coef: float, target: float, horizon: float):
        given = {"kl_coef": kl_coef, "target": target, "horizon": horizon}
        for name, value in given.items():
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        self.kl_coef, self.target, self.horizon = kl_coef, target, horizon

    def update(self, kl: float, n_episodes: int) -> float:
        """Take one measured KL over n_episodes in, and return the new coefficient."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.kl_coef *= 1 + error * n_episodes / self.horizon
        return self.kl_coef
