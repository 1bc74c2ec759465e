"""What the checks of utils/ppo.py do not ask: extremes, padding, gradients, shapes.

Against their definitions, with gradients and every known mistake, the formulas are held
by tests/practice/test_checks.py.
"""

import itertools
import math

import pytest
import torch

from tests.small import t
from utils import ppo

EXACT = {"atol": 1e-12, "rtol": 0}
NAN, INF, LOG = float("nan"), float("inf"), math.log


def about(x):
    return pytest.approx(x, abs=1e-12)


def random_case(seed, batch=5, length=7):
    """Float64 tensors, and a mask of responses of 1 to `length` tokens."""
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return torch.randn(batch, length, generator=generator, dtype=torch.float64)

    lengths = torch.randint(1, length + 1, (batch,), generator=generator)
    lengths[0], lengths[1] = 1, length  # one ends at once, one never does
    return draw, (torch.arange(length) < lengths[:, None]).long()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_in_half_precision_are_worked_on_in_float32(dtype):
    """They lie near -100, where GPT-2's do."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(4, 6, 50, generator=generator) * 3 - 100).to(dtype)
    labels, mask = torch.randint(50, (4, 6), generator=generator), torch.ones(4, 6)
    for function, rest in ((ppo.token_logprobs, labels), (ppo.entropy, mask)):
        got, exact = function(logits, rest), function(logits.double(), rest)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), exact, atol=3e-5, rtol=0)


def test_whitening_of_nothing_of_equal_numbers_and_with_any_mask():
    x, mask = t([1.0, 2.0, 99.0], [6.0, 99.0, 99.0]), t([1, 1, 0], [1, 0, 0])
    for function in (ppo.masked_mean, ppo.masked_var, ppo.masked_whiten):
        assert function(x, torch.zeros(2, 3)).eq(0).all()  # nothing is left, and no NaN
    for dtype in (torch.bool, torch.int64, torch.float32):
        assert torch.equal(*(ppo.masked_whiten(x, m) for m in (mask.to(dtype), mask)))
    # equal numbers become 0, and hardly different ones stay small
    for scale in (0.0, 1e-10, 1e-6, 1e-4, 1.0):
        white = ppo.masked_whiten(t([3.0 + scale, 3.0 - scale, 99.0]), t([1, 1, 0]))
        height = scale / math.sqrt(scale**2 + 1e-8)  # the variance is scale squared
        expected = t([height, -height, 0.0])
        torch.testing.assert_close(white, expected, atol=1e-6, rtol=0)


def test_what_is_learned_from_carries_no_gradient():
    """Rewards, advantages, returns and statistics are numbers to the losses."""
    draw, mask = random_case(0)
    a, b, c = (draw().requires_grad_() for _ in range(3))
    found = [ppo.token_rewards(a[:, 0], a, b, mask, 0.1), *ppo.compute_gae(a, b, mask)]
    for function in (ppo.policy_loss, ppo.value_loss):
        loss, stats = function(a, b, c, mask)
        assert loss.requires_grad
        found += stats.values()
    assert not any(x.requires_grad for x in found)


def test_entropy_by_hand_and_its_gradient_where_a_probability_underflows():
    logits = torch.zeros(1, 3, 4, dtype=torch.float64)
    logits[0, 1] = torch.tensor([0.0, -INF, -INF, 0.0])
    logits[0, 2] = NAN  # outside the mask
    assert ppo.entropy(logits, t([1, 1, 0])).item() == about((LOG(4) + LOG(2)) / 2)
    logits = torch.tensor([[[0.0, -200.0, -3.0]]], requires_grad=True)
    H = ppo.entropy(logits, torch.ones(1, 1))
    H.backward()
    p = torch.tensor([0.0, -3.0]).softmax(0)
    expected = -p * (p.log() - (p * p.log()).sum())
    torch.testing.assert_close(logits.grad[0, 0, [0, 2]], expected)
    assert logits.grad[0, 0, 1] == 0


def test_explained_variance_by_hand_in_any_unit():
    """Residuals 1, 0, 1: a variance of 2/9 of 2/3."""
    mask, x = t([1, 1, 1, 0]), [1.0, 2.0, 3.0, 99.0]
    shares = [(x, 1), ([5.0] * 4, 0), ([0.0, 2.0, 2.0, 0.0], 1 - (2 / 9) / (2 / 3))]
    for scale, (values, share) in itertools.product((1e-20, 1, 1e12), shares):
        got = ppo.explained_variance(t(values) * scale, t(x) * scale, mask)
        assert got.item() == about(share)
    # returns vary from a hundred-thousandth of their size on; of constant ones it is 0
    for spread, expected in ((1.2e-5, 1.0), (0.8e-5, 0.0), (0.0, 0.0)):
        returns = t([7 * (1 + spread), 7 * (1 - spread), 1e6]).requires_grad_()
        share = ppo.explained_variance(returns, returns.detach(), t([1, 1, 0]))
        share.backward()
        assert share == expected and returns.grad.isfinite().all()


def test_the_largest_ratio_is_a_real_tokens():
    zeros, ratios = t([0.0] * 3), t([0.5, 0.25, 9.0])
    _, stats = ppo.policy_loss(ratios.log(), zeros, zeros, t([1, 1, 0]))
    assert stats["ratio_max"].item() == about(0.5)


def test_adaptive_kl_by_hand():
    """10 % above the target, then far above, then far below; each from the last."""
    control, expected = ppo.AdaptiveKL(kl_coef=0.2, target=6.0, horizon=10_000), 0.2
    for kl, error in ((6.6, 0.1), (60.0, 0.2), (0.0, -0.2)):
        expected *= 1 + error * 0.05
        assert control.update(kl, n_episodes=500) == pytest.approx(expected)
        assert control.kl_coef == pytest.approx(expected)


def of_vocabulary(x, mask):
    """The entropy of two words, of which this is the one's logit."""
    return ppo.entropy(torch.stack([x, torch.ones_like(x)], dim=-1), mask)


FUNCTIONS = {  # name: (function of token-shaped tensors and mask, how many tensors)
    "masked_mean": (ppo.masked_mean, 1),
    "masked_var": (ppo.masked_var, 1),
    "masked_whiten": (ppo.masked_whiten, 1),
    "entropy": (of_vocabulary, 1),
    "token_rewards": (
        lambda a, b, m: ppo.token_rewards(torch.ones(len(m)).double(), a, b, m, 0.1),
        2,
    ),
    "compute_gae": (lambda a, b, m: torch.stack(ppo.compute_gae(a, b, m)), 2),
    "policy_loss": (lambda a, b, c, m: ppo.policy_loss(a, b, c, m)[0], 3),
    "value_loss": (lambda a, b, c, m: ppo.value_loss(a, b, c, m)[0], 3),
    "explained_variance": (ppo.explained_variance, 2),
}


def result(name, tensors, mask):
    """What a function gives, and its gradients where there are any."""
    inputs = [x.clone().requires_grad_() for x in tensors]
    out = FUNCTIONS[name][0](*inputs, mask)
    if out.requires_grad:
        (out * torch.linspace(1, 2, out.shape[-1] if out.dim() else 7)).sum().backward()
    return out.detach(), [x.grad for x in inputs if x.grad is not None]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_neither_padding_nor_the_order_of_the_responses_matters(name):
    """To no result and no gradient; what is token-shaped is permuted along."""
    draw, mask = random_case(3)
    tensors, order = [draw() for _ in range(FUNCTIONS[name][1])], torch.randperm(5)
    out, grads = result(name, tensors, mask)
    for value in (NAN, INF, 1e30):
        dirty = [x.masked_fill(mask == 0, value) for x in tensors]
        got, dirty_grads = result(name, dirty, mask)
        assert torch.equal(out, got)
        for a, b in zip(grads, dirty_grads, strict=True):
            assert torch.equal(a, b) and b[mask == 0].eq(0).all()
    widen, noisy = (torch.nn.ConstantPad1d((2, 3), value) for value in (0, 7.0))
    wide, _ = result(name, map(noisy, tensors), widen(mask))
    if out.dim():
        assert wide[..., :2].eq(0).all() and wide[..., -3:].eq(0).all()
    torch.testing.assert_close(wide[..., 2:-3] if out.dim() else wide, out, **EXACT)
    other, other_grads = result(name, [x[order] for x in tensors], mask[order])
    torch.testing.assert_close(other, out[..., order, :] if out.dim() else out, **EXACT)
    for a, b in zip(grads, other_grads, strict=True):
        torch.testing.assert_close(b, a[order], **EXACT)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_shapes_that_disagree_are_named(name):
    """Whichever tensor it is, also where torch would stretch it to fit."""
    function, count = FUNCTIONS[name]
    for odd in range(count + 1):
        given = [torch.ones(2, 1 if i == odd else 3) for i in range(count + 1)]
        with pytest.raises(ValueError, match=r"(?=.* \(2, 3\)).* \(2, 1\)"):
            function(*given)


X, LABELS = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)
BAD = [
    (ppo.kl_estimate, (X, X, "k4"), r"'k4'.*\(2, 3\)"),
    (ppo.kl_estimate, (X, X[:, :1]), r"logprobs \(2, 3\).*logprobs \(2, 1\)"),
    (ppo.token_rewards, (torch.zeros(3), X, X, X, 0.1), r"scores \(3,\).*\(2,\)"),
    (ppo.token_logprobs, (X, torch.cat([LABELS, LABELS])), r"\(2,\).*\(4,\)"),
    (ppo.token_logprobs, (X, LABELS, 0), "temperature.*0"),
]


@pytest.mark.parametrize("function, arguments, message", BAD)
def test_other_bad_arguments_are_named(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)
