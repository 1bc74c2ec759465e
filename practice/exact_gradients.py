"""Bias and variance of estimators of the policy gradient, exactly, in the exact world.

An estimator samples a group of k responses and gives each token's gradient of its
log-probability a weight. There are fifteen responses, so its mean and its variance are
sums over all groups, and no simulation is needed.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from practice.exact_world import ExactWorld


@dataclass(frozen=True)
class Moments:
    """Mean (n,) of an estimator's gradient, and the trace of its covariance."""

    mean: Tensor
    variance: float

    def bias(self, exact: Tensor) -> tuple[float, float]:
        """Distance of the mean from the exact gradient, relative to that; their angle.

        The angle is in degrees: a mean that is only too long or too short has none.
        """
        distance = ((self.mean - exact).norm() / exact.norm()).item()
        # Better than the arc cosine, which sees no angle below 1e-8
        a, b = self.mean / self.mean.norm(), exact / exact.norm()
        half = math.atan2((a - b).norm().item(), (a + b).norm().item())
        return distance, math.degrees(2 * half)


def _flat(gradients):
    return torch.cat([g.flatten() for g in gradients])


def exact_gradient(world: ExactWorld, lm, kl_coef: float) -> Tensor:
    """The gradient (n,) of J with respect to all weights of the language model."""
    objective = world.objective(world.logprobs(lm), kl_coef)
    return _flat(torch.autograd.grad(objective, list(lm.parameters()))).double()


def token_gradients(world: ExactWorld, lm) -> Tensor:
    """The gradients (15, 3, n) of all tokens' log-probabilities; 0 for padding."""
    logprobs, weights = world.token_logprobs(lm), list(lm.parameters())
    size = sum(w.numel() for w in weights)
    found = torch.zeros(*world.mask.shape, size, dtype=torch.float64)
    for i, t in world.mask.nonzero().tolist():
        slopes = torch.autograd.grad(logprobs[i, t], weights, retain_graph=True)
        found[i, t] = _flat(slopes)
    return found


def moments(world: ExactWorld, lm, weights: Callable, k: int) -> Moments:
    """Mean and variance of an estimator that samples groups of k from the model.

    `weights` takes groups as numbers of responses (groups, k), and returns what the
    gradient of each token's log-probability is multiplied by, (groups, k, 3); their sum
    is the estimate. It must not depend on the order within a group.
    """
    gradients = token_gradients(world, lm).flatten(0, 1)
    gram = gradients @ gradients.t()
    logprobs = world.logprobs(lm).detach()
    # Every group once, and how many orders it comes in: k! / (the counts' factorials)
    groups = list(itertools.combinations_with_replacement(range(len(logprobs)), k))
    counts = [map(math.factorial, Counter(group).values()) for group in groups]
    orders = [math.factorial(k) / math.prod(factorials) for factorials in counts]
    groups, orders = torch.tensor(groups), torch.tensor(orders, dtype=torch.float64)
    chances = orders * logprobs[groups].sum(dim=1).exp()
    tokens = world.mask.shape[1]
    places = groups.unsqueeze(2) * tokens + torch.arange(tokens)
    each = weights(groups).double()
    coefficients = torch.zeros(len(groups), len(gradients), dtype=torch.float64)
    coefficients.scatter_add_(1, places.flatten(1), each.flatten(1))
    mean = chances @ coefficients
    squares = ((coefficients @ gram) * coefficients).sum(dim=1)
    return Moments(mean @ gradients, (chances @ squares - mean @ gram @ mean).item())
