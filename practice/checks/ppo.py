"""Checks of the formulas of PPO: rewards, KL, whitening, advantages and losses."""

import torch

from practice.checks.comparison import check

ALL = torch.ones_like


def k3(log_ratio):
    """The estimate of the KL whose samples are never negative."""
    return torch.exp(-log_ratio) - 1 + log_ratio


def _rewards(
    scores, logprobs, ref, mask, beta, kl=torch.clone, paying=torch.clone,
    place=lambda n, width: n - 1,
):  # fmt: skip
    """Each token pays for its KL; the score at `place(n, T)` of n tokens."""
    rewards = -beta * kl(logprobs - ref) * paying(mask)
    for row, score, n in zip(rewards, scores, mask.sum(dim=1).tolist(), strict=True):
        row[place(n, len(row))] += score
    return rewards


REWARDS = {
    "the sign of the KL is turned": {"kl": torch.neg},
    "the score stands on the slot after EOS":  # where there is none, it is lost
        [{"place": lambda n, width: slice(n, n + 1)},
         {"place": lambda n, width: min(n, width - 1)}],
    "the score stands on the last slot, padding or not": {"place": lambda *_: -1},
    "the score stands on the first token": {"place": lambda *_: 0},
    "every token gets the score": {"place": lambda n, width: slice(n)},
    "the score is left out": {"place": lambda *_: slice(0)},
    "the KL coefficient is left out": {"beta": 1},
    "the KL penalty is left out": {"beta": 0},
    "padding pays for its KL, too": {"paying": ALL},
    "k3 stands for k1; only k1 adds up to the response's log-ratio": {"kl": k3},
}  # fmt: skip


@check(_rewards, REWARDS, "rewards")
def check_token_rewards(case):
    """`token_rewards(scores, logprobs, ref_logprobs, mask, kl_coef)` -> (B, T)."""
    logprobs, ref = -case.normal().abs(), -case.normal().abs()
    scores, beta = case.normal(len(case.mask)), case.uniform(0.1, 0.5)
    return scores, logprobs, ref, case.mask, beta


def _estimates(new, ref, kind, k1=torch.clone, k2=lambda x: x**2 / 2, k3=k3):
    return {"k1": k1, "k2": k2, "k3": k3}[kind](new - ref)


ESTIMATES = {
    "the sign of k1 is turned": {"k1": torch.neg},
    "k1 is made positive; only its mean is": {"k1": abs},
    "the factor 1/2 of k2 is left out": {"k2": torch.square},
    "k3 takes the log-ratio reversed; its mean is then not KL(pi || pi_ref)":
        {"k3": lambda x: k3(-x)},
    "k3 lacks its last term": {"k3": lambda x: k3(x) - x},
    "the sign of k3 is turned": {"k3": lambda x: -k3(x)},
}  # fmt: skip


@check(_estimates, ESTIMATES, "")
def check_kl_estimate(case):
    """`kl_estimate(logprobs, ref_logprobs, kind)` for k1, k2 and k3."""
    p, q = (case.normal(3, 5).log_softmax(dim=-1) for _ in range(2))
    return {kind: (p, q, kind) for kind in ("k1", "k2", "k3")}


def _whiten(x, mask, of=1, to=0, power=0.5, lost=0, seen=torch.clone, kept=torch.clone):
    """x less its mean, by its variance (over n - lost) ** power; 0 outside the mask."""
    real = x[seen(mask).bool()]
    mean = real.sum() / len(real)
    variance = ((real - mean) ** 2).sum() / (len(real) - lost)
    return ((x - of * mean) / variance**power + to * mean) * kept(mask)


WHITENING = {
    "the mean is added back": {"to": 1},
    "padding is counted in the mean and variance": {"seen": ALL},
    "padding is counted, and whitened too": {"seen": ALL, "kept": ALL},
    "the variance is divided by n - 1, not n": {"lost": 1},
    "the mean is not taken away": {"of": 0},
    "the variance is not made 1": {"power": 0},
    "the divisor is the variance, not its root": {"power": 1},
}


@check(_whiten, WHITENING, "result")
def check_whiten(case):
    """`masked_whiten(x, mask)`: mean 0 and population variance 1 over the mask."""
    return 3 + 2 * case.normal(), case.mask


def _left(x):
    """x (B, T) with every slot's number one slot earlier, 0 in the last."""
    return torch.nn.functional.pad(x[:, 1:], (0, 1))


def _gae(
    rewards, values, mask, gamma, lam, real=torch.clone, inside=torch.clone,
    read=torch.clone, added=torch.clone, out=torch.mul, summed=torch.mul,
):  # fmt: skip
    """A_t as the explicit sum of the TD errors that follow (GAE, equation 16).

    What a mistake changes: where values and TD errors are `real` and `inside`, how
    values are `read` and `added`, and what goes `out`, and is `summed` to the returns.
    """
    values = values * real(mask)
    seen = read(values)
    delta = (rewards + gamma * _left(seen) - seen) * inside(mask)
    places = torch.arange(mask.shape[1], dtype=delta.dtype)
    weights = ((gamma * lam) ** (places - places[:, None]).clamp(min=0)).triu()
    advantages = delta @ weights.t()
    return out(advantages, mask), summed(advantages, mask) + added(values) * mask


ADVANTAGES = {
    "the advantages are whitened first, before the returns are formed":
        [{"out": _whiten, "summed": _whiten}, {"summed": _whiten}],
    "the advantages come out whitened": {"out": _whiten},
    "the values are read one slot late":
        [{"read": _left, "added": _left}, {"read": _left}],
    "the sum runs on into the padding": {"real": ALL, "inside": ALL},
    "the slot behind EOS has a value; nothing more is to come, so it is 0":
        {"real": ALL},
    "lambda is left out": {"lam": 1.0},
    "gamma is left out": {"gamma": 1.0},
    "only the TD error of the token itself counts": {"lam": 0.0},
    "the sum runs from first token to last": lambda r, v, m, *rest: tuple(
        x.flip(1) for x in _gae(r.flip(1), v.flip(1), m.flip(1), *rest)
    ),
    "the returns lack the values: G = A + V": {"added": torch.zeros_like},
}  # fmt: skip


@check(_gae, ADVANTAGES, "advantages", "returns")
def check_gae(case):
    """`compute_gae(rewards, values, mask, gamma, lam)` -> advantages, returns."""
    gamma, lam = case.uniform(0.7, 0.95), case.uniform(0.3, 0.9)
    return case.normal(), case.normal(), case.mask, gamma, lam


def _mean(x, mask):
    return x[mask.bool()].mean()


def _near(ratio, clip):
    return ratio.clamp(1 - clip, 1 + clip)


def _policy_loss(
    new, old, A, mask, clip, pick=torch.maximum, sign=1, turn=1, kl=k3, near=_near,
    mean=_mean,
):  # fmt: skip
    """PPO's loss; the rest says what a mistake changes. The statistics stay right."""
    ratio = torch.exp(turn * (new - old))
    plain, clipped = (-sign * A * x for x in (ratio, near(ratio, clip)))
    rho, A = torch.exp(new - old)[mask.bool()], A[mask.bool()]
    return mean(pick(plain, clipped), mask), {
        "approx_kl": kl(-rho.log()).mean(),
        "clip_fraction": (A * _near(rho, clip) < A * rho).double().mean(),
        "ratio_mean": rho.mean(),
        "ratio_max": rho.max(),
    }


def _value_loss(
    values, old, returns, mask, clip, at=lambda old, returns: old, pick=torch.maximum,
    half=0.5, mean=_mean,
):  # fmt: skip
    """The loss of the value head; a mistake clips around `at`. The share is right."""
    centres = old, at(old, returns)
    near, wrong = (torch.clamp(values, x - clip, x + clip) for x in centres)
    plain, clipped, wrong = ((x - returns) ** 2 for x in (values, near, wrong))
    share = _mean((clipped > plain).double(), mask)
    return half * mean(pick(plain, wrong), mask), {"value_clip_fraction": share}


OF_BOTH = {
    "there is no mask: padding counts like a token": {"mean": lambda x, mask: x.mean()},
    "the sum is divided by the number of all slots, not of the real tokens":
        {"mean": lambda x, mask: (x * mask).mean()},
    "each response weighs the same; in PPO each token does":
        {"mean": lambda x, mask: ((x * mask).sum(dim=1) / mask.sum(dim=1)).mean()},
    "the loss has no gradient (detached, or made under no_grad?)":
        {"mean": lambda x, mask: _mean(x, mask).detach()},
}  # fmt: skip
POLICY_LOSS = {
    "min stands for max (a loss takes the larger)": {"pick": torch.minimum},
    "the sign is turned: worse tokens become likelier": {"sign": -1},
    "the sign is turned, and min stands for max": {"sign": -1, "pick": torch.minimum},
    "the ratio is not clipped": {"pick": lambda plain, clipped: plain},
    "only the clipped branch is there": {"pick": lambda plain, clipped: clipped},
    "log rho is clipped, not rho":
        {"near": lambda ratio, clip: ratio.log().clamp(-clip, clip).exp()},
    "the ratio is turned around: rho = pi_theta / pi_old": {"turn": -1},
    **OF_BOTH,
    "approx_kl is turned around; pi_old sampled": {"kl": lambda x: k3(-x)},
}  # fmt: skip
VALUE_LOSS = {
    "nothing is clipped (around the return nothing ever is; clip around the old "
    "value)": [{"pick": lambda plain, _: plain}, {"at": lambda old, returns: returns}],
    "the value is clipped around 0, not around the old value":
        {"at": lambda old, returns: 0 * old},
    "min stands for max of the two errors": {"pick": torch.minimum},
    "only the clipped error is there": {"pick": lambda plain, clipped: clipped},
    "the factor 1/2 is left out": {"half": 1.0},
    **OF_BOTH,
}  # fmt: skip


@check(_policy_loss, POLICY_LOSS, "loss", "gradient", "stats", leaves=1)
def check_policy_loss(case):
    """`policy_loss(logprobs, old, advantages, mask, clip_range)` -> loss, stats."""
    clip = case.uniform(0.1, 0.3)
    old, step, advantages = -1 - case.normal().abs(), 0.3 * case.normal(), case.normal()
    # In the longest response: far up and far down, of praised and blamed tokens
    step[1, :4] = case.uniform(1, 1.3) * torch.tensor([0.5, 0.5, -0.7, -0.7])
    advantages[1, :4] = case.uniform(0.5, 1.5) * torch.tensor([1.0, -1.0, 1.0, -1.0])
    return old + step, old, advantages, case.mask, clip


@check(_value_loss, VALUE_LOSS, "loss", "gradient", "stats", leaves=1)
def check_value_loss(case):
    """`value_loss(values, old_values, returns, mask, clip_range)` -> loss, stats."""
    clip = case.uniform(0.1, 0.3)
    old, step, returns = case.normal(), 0.3 * case.normal(), case.normal()
    # In the longest response: moved far, towards the return and past it
    step[1, :4] = case.uniform(1, 1.3) * torch.tensor([0.6, -0.6, 0.6, -0.6])
    returns[1, :4] = old[1, :4] + torch.tensor([2.0, -2.0, -1.0, 1.0])
    return old + step, old, returns, case.mask, clip
