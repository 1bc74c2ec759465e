"""The best possible J, estimated from samples, against worlds in which it is known."""

import math

import pytest
import torch

from practice.exact_world import ExactWorld
from utils.evaluation import best_possible

PROMPTS, EACH, SETS = 64, 64, 100  # of samples: each is an estimate of its own
# The reference's logits times so much, beta, and seeds. In the second row the best
# policy is far: 3 to 8 nats of KL
NEAR = [(1, 0.5, seed) for seed in range(10)]
FAR = [(1, 0.1, seed) for seed in (0, 1, 4)]
FAR += [(6, 0.1, seed) for seed in (0, 1, 3, 5, 6, 7, 8)]


def world(sharper, beta, seed):
    """The log-probabilities of reference and best policy, the scores, and J*."""
    world = ExactWorld(seed)
    with torch.no_grad():
        world.reference.lm_head.weight.mul_(sharper)
        log_ref = world.logprobs(world.reference).log_softmax(dim=0)
        log_best, most = world.optimum(beta)
    return log_ref, log_best, world.scores.double(), most.item()


def estimate(log_ref, log_pi, scores, beta, alone=False, seed=0):
    """Mean error bars and estimates of J* (SETS,), of samples of both or of one."""
    generator = torch.Generator().manual_seed(seed)

    def draw(log_p, n):
        size = SETS * PROMPTS * n
        found = torch.multinomial(log_p.exp(), size, True, generator=generator)
        return found.view(-1, n)

    half = EACH // 2
    rows = [draw(log_ref, EACH)] if alone else [draw(log_ref, half), draw(log_pi, half)]
    rows = torch.cat(rows, dim=1)
    ratios = 0 * scores if alone else log_pi - log_ref
    best, weights = best_possible(scores[rows], ratios[rows], beta)
    assert weights.sum(dim=1).allclose(torch.ones((), dtype=torch.float64))
    best = best.view(SETS, PROMPTS)
    return best.mean(dim=1), best.std(dim=1) / math.sqrt(PROMPTS)


@pytest.mark.parametrize("sharper, beta, seed", NEAR + FAR)
def test_in_an_exact_world(sharper, beta, seed):
    log_ref, log_best, scores, most = world(sharper, beta, seed)
    kl = (log_best.exp() * (log_best - log_ref)).sum().item()
    log_pi = (0.25 * log_ref + 0.75 * log_best).log_softmax(dim=0)  # on its way
    found, error = estimate(log_ref, log_pi, scores, beta)
    covered = ((found - most).abs() <= 1.96 * error).double().mean().item()
    before, before_error = estimate(log_ref, log_pi, scores, beta, alone=True)
    once = ((before - most).abs() <= 1.96 * before_error).double().mean().item()
    # Its worst: every response like one that the reference writes anyway
    log_mode = torch.full_like(log_ref, -30.0)
    log_mode[log_ref.argmax()] = 0.0
    collapsed, _ = estimate(log_ref, log_mode.log_softmax(dim=0), scores, beta)
    off = [(x.mean() - most).item() for x in (found, before, collapsed)]
    assert abs(off[0]) <= 0.006 and covered >= 0.8
    assert max(off[1:]) < 0.006  # too low, or about right; never too high
    if kl > 3:  # nothing warns of what neither of them writes
        assert max(off[1:]) < -0.03 and once <= 0.3
