"""Every function of utils/ppo.py against numbers worked by hand, and a definition."""

import itertools
import math

import pytest
import torch

from utils import ppo

EXACT = {"atol": 1e-12, "rtol": 0}


def t(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def random_case(seed, batch=5, length=7):
    """Float64 tensors, and a mask of responses of 1 to `length` tokens."""
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return torch.randn(batch, length, generator=generator, dtype=torch.float64)

    lengths = torch.randint(1, length + 1, (batch,), generator=generator)
    lengths[0], lengths[1] = 1, length  # one ends at once, one never does
    mask = (torch.arange(length) < lengths[:, None]).long()
    return draw, mask


def tokens(mask):
    """The places (b, t) of the real tokens."""
    return [tuple(place) for place in mask.nonzero().tolist()]


def poison(x, mask, value):
    return x.masked_fill(mask == 0, value)


def test_token_logprobs_by_hand():
    logits = t([0.0, math.log(3.0)], [math.log(4.0), 0.0])
    got = ppo.token_logprobs(logits, torch.tensor([1, 1]))
    torch.testing.assert_close(got, t(math.log(0.75), math.log(0.2)), **EXACT)


def test_token_logprobs_temperature_divides_the_logits():
    logits = t([0.0, math.log(9.0)])
    got = ppo.token_logprobs(logits, torch.tensor([1]), temperature=2.0)
    torch.testing.assert_close(got, t(math.log(0.75)), **EXACT)


def test_token_logprobs_is_accurate_at_gpt2s_logits():
    """GPT-2's logits lie near -100; the answer must not depend on that offset."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 6, 50, generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(50, (4, 6), generator=generator)
    exact = logits.softmax(-1).gather(-1, labels[..., None])[..., 0].log()
    near_100 = (logits - 100).float()
    assert ppo.token_logprobs(near_100, labels).dtype == torch.float32
    torch.testing.assert_close(
        ppo.token_logprobs(near_100, labels).double(), exact, atol=3e-5, rtol=0
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_worked_on_in_float32(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(4, 6, 50, generator=generator) * 3 - 100).to(dtype)
    labels = torch.randint(50, (4, 6), generator=generator)
    got = ppo.token_logprobs(logits, labels, temperature=1.5)
    exact = ppo.token_logprobs(logits.double(), labels, temperature=1.5)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, atol=3e-5, rtol=0)
    mask = torch.ones(4, 6)
    got, exact = ppo.entropy(logits, mask), ppo.entropy(logits.double(), mask)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, atol=3e-5, rtol=0)


def test_the_only_word_of_a_vocabulary_is_certain():
    logits, labels = t([[5.0]]), torch.tensor([[0]])
    assert ppo.token_logprobs(logits, labels).eq(0).all()
    assert ppo.entropy(logits, torch.ones(1, 1)) == 0


def test_an_empty_mask_leaves_nothing_and_no_nan():
    x, mask = t([1.0, 2.0], [3.0, 4.0]), torch.zeros(2, 2)
    for function in (ppo.masked_mean, ppo.masked_var, ppo.masked_whiten):
        assert function(x, mask).eq(0).all()


def test_masked_statistics_by_hand():
    x, mask = t([1.0, 2.0, 99.0], [6.0, 99.0, 99.0]), t([1, 1, 0], [1, 0, 0])
    assert ppo.masked_mean(x, mask).item() == 3.0
    assert ppo.masked_var(x, mask).item() == pytest.approx(14 / 3, abs=1e-12)
    white = ppo.masked_whiten(x, mask)
    sd = math.sqrt(14 / 3)
    expected = t([-2 / sd, -1 / sd, 0.0], [3 / sd, 0.0, 0.0])
    torch.testing.assert_close(white, expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize("scale", [0.0, 1e-10, 1e-6, 1e-4, 1.0])
def test_whitening_divides_by_the_root_of_the_variance_and_1e_8(scale):
    """Equal numbers become 0, and hardly different ones stay small."""
    white = ppo.masked_whiten(t([3.0 + scale, 3.0 - scale, 99.0]), t([1, 1, 0]))
    height = scale / math.sqrt(scale**2 + 1e-8)  # the variance is scale squared
    expected = t([height, -height, 0.0])
    torch.testing.assert_close(white, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_masks_of_any_type_agree(dtype):
    draw, mask = random_case(0)
    x = draw()
    assert torch.equal(
        ppo.masked_whiten(x, mask.to(dtype)), ppo.masked_whiten(x, mask.double())
    )


def test_kl_estimates_by_hand():
    logprobs, ref = t([math.log(0.5)]), t([math.log(0.25)])
    ratio = math.log(2)
    for kind, expected in (
        ("k1", ratio),
        ("k2", ratio**2 / 2),
        ("k3", 0.5 - 1 + ratio),
    ):
        got = ppo.kl_estimate(logprobs, ref, kind).item()
        assert got == pytest.approx(expected, abs=1e-12)


def test_kl_estimates_mean_is_the_exact_kl():
    p, q = t(0.7, 0.2, 0.1), t(0.3, 0.3, 0.4)
    exact = sum(
        a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True)
    )
    for kind in ("k1", "k3"):
        mean = (p * ppo.kl_estimate(p.log(), q.log(), kind)).sum().item()
        assert mean == pytest.approx(exact, abs=1e-12)
    assert (ppo.kl_estimate(p.log(), q.log(), "k3") >= 0).all()


def test_token_rewards_by_hand():
    logprobs, ref = (
        t([-1.0, -2.0, -7.0], [-0.5, -7.0, -7.0]),
        t([-2.0, -1.0, 0.0], [-0.5, 0, 0]),
    )
    mask = t([1, 1, 0], [1, 0, 0])
    got = ppo.token_rewards(t(3.0, -1.0)[:], logprobs, ref, mask, kl_coef=0.1)
    torch.testing.assert_close(got, t([-0.1, 3.1, 0.0], [-1.0, 0.0, 0.0]), **EXACT)


@pytest.mark.parametrize("seed", range(5))
def test_token_rewards_sum_to_score_minus_kl(seed):
    draw, mask = random_case(seed)
    logprobs, ref, scores = draw(), draw(), draw()[:, 0]
    got = ppo.token_rewards(scores, logprobs, ref, mask, 0.3)
    for b in range(len(mask)):
        length = int(mask[b].sum())
        for i in range(mask.shape[1]):
            expected = -0.3 * (logprobs[b, i] - ref[b, i]).item() if i < length else 0.0
            expected += scores[b].item() if i == length - 1 else 0.0
            assert got[b, i].item() == pytest.approx(expected, abs=1e-12)


def test_gae_by_hand():
    rewards, values = t([0.0, 1.0, 5.0]), t([0.5, 0.25, 9.0])
    # the third slot is padding: delta_1 = 1 - 0.25, delta_0 = 0.25 - 0.5
    advantages, returns = ppo.compute_gae(rewards, values, t([1, 1, 0]), 1.0, 0.5)
    torch.testing.assert_close(advantages, t([-0.25 + 0.5 * 0.75, 0.75, 0]), **EXACT)
    torch.testing.assert_close(returns, t([0.625, 1.0, 0.0]), **EXACT)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (0.97, 0.0), (1, 1)])
def test_gae_is_the_double_sum(seed, gamma, lam):
    """A_t = sum_k (gamma lam)^k delta_{t+k}, summed term by term (GAE, equation 16)."""
    draw, mask = random_case(seed)
    rewards, values = draw(), draw()
    advantages, returns = ppo.compute_gae(rewards, values, mask, gamma, lam)
    for b in range(len(mask)):
        n = int(mask[b].sum())
        V = [*values[b, :n].tolist(), 0.0]
        for i in range(mask.shape[1]):
            expected = sum(
                (gamma * lam) ** k
                * (rewards[b, i + k].item() + gamma * V[i + k + 1] - V[i + k])
                for k in range(n - i)
            )
            assert advantages[b, i].item() == pytest.approx(expected, abs=1e-12)
            value = V[i] if i < n else 0.0
            assert returns[b, i].item() == pytest.approx(expected + value, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_gae_at_lambda_0_and_1(seed):
    """The TD error of the token alone, and the return less the value."""
    draw, mask = random_case(seed)
    rewards, values = draw(), draw()
    td, _ = ppo.compute_gae(rewards, values, mask, gamma=0.9, lam=0.0)
    monte_carlo, returns = ppo.compute_gae(rewards, values, mask, gamma=0.9, lam=1.0)
    for b, t in tokens(mask):
        n = int(mask[b].sum())
        V_next = values[b, t + 1] if t + 1 < n else 0.0
        delta = rewards[b, t] + 0.9 * V_next - values[b, t]
        torch.testing.assert_close(td[b, t], delta, **EXACT)
        total = sum(0.9 ** (k - t) * rewards[b, k] for k in range(t, n))
        torch.testing.assert_close(returns[b, t], total, **EXACT)
        torch.testing.assert_close(monte_carlo[b, t], total - values[b, t], **EXACT)


def test_a_rollout_of_one_token():
    logprobs, ref, mask = t([-1.0], [-2.0]), t([-3.0], [-2.0]), t([1], [1])
    rewards = ppo.token_rewards(t(5.0, 6.0), logprobs, ref, mask, kl_coef=0.1)
    torch.testing.assert_close(rewards, t([5 - 0.1 * 2], [6.0]), **EXACT)
    advantages, returns = ppo.compute_gae(rewards, t([1.0], [2.0]), mask)
    torch.testing.assert_close(advantages, t([3.8], [4.0]), **EXACT)
    torch.testing.assert_close(returns, rewards, **EXACT)


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


@pytest.mark.parametrize("seed", range(5))
def test_policy_loss_token_by_token(seed):
    draw, mask = random_case(seed)
    new, old, advantages = draw() * 0.3, draw() * 0.3, draw()
    loss, stats = ppo.policy_loss(new, old, advantages, mask, clip_range=0.2)
    losses, clipped, ratios, k3 = [], [], [], []
    for place in tokens(mask):
        ratio, a = math.exp(new[place] - old[place]), advantages[place].item()
        limited = min(max(ratio, 0.8), 1.2)
        losses.append(-min(a * ratio, a * limited))
        clipped.append(a * limited < a * ratio)
        ratios.append(ratio)
        k3.append(ratio - 1 - math.log(ratio))
    n = len(losses)
    assert loss.item() == pytest.approx(sum(losses) / n, abs=1e-12)
    assert stats["clip_fraction"].item() == pytest.approx(sum(clipped) / n, abs=1e-12)
    assert 0 < sum(clipped) < n
    assert stats["ratio_mean"].item() == pytest.approx(sum(ratios) / n, abs=1e-12)
    assert stats["ratio_max"].item() == pytest.approx(max(ratios), abs=1e-12)
    assert stats["approx_kl"].item() == pytest.approx(sum(k3) / n, abs=1e-12)


def test_policy_loss_gradient_at_ratio_one_and_where_clipped():
    """-A grad log pi at ratio 1; none once a token has moved far enough, either way."""
    A = t([2.0, -3.0, 1.0, -1.0, 1.0, -1.0])
    ratio = t([1.0, 1.0, 1.5, 0.5, 0.5, 1.5])
    logprobs = ratio.log().requires_grad_()
    loss, _ = ppo.policy_loss(logprobs, torch.zeros(1, 6).double(), A, t([1] * 6), 0.2)
    loss.backward()
    expected = t([-2.0, 3.0, 0.0, 0.0, -0.5, 1.5]) / 6
    torch.testing.assert_close(logprobs.grad, expected, **EXACT)


def test_the_first_step_is_the_policy_gradient():
    """At ratio 1, from the logits on: the mean over the tokens of -A grad log pi."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(6, (3, 4), generator=generator)
    A = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0]])
    old = ppo.token_logprobs(logits, labels)

    def loss(logits):
        logprobs = ppo.token_logprobs(logits, labels)
        return ppo.policy_loss(logprobs, old, A, mask, clip_range=0.2)[0]

    logits.requires_grad_()
    assert torch.autograd.gradcheck(loss, (logits,))
    (gradient,) = torch.autograd.grad(loss(logits), logits)
    # grad log softmax = one-hot - softmax
    chosen = torch.nn.functional.one_hot(labels, 6) - logits.softmax(-1)
    expected = -(A * mask)[..., None] * chosen / mask.sum()
    torch.testing.assert_close(gradient, expected, **EXACT)


@pytest.mark.parametrize("seed", range(3))
def test_loss_gradients_agree_with_finite_differences(seed):
    draw, mask = random_case(seed)
    x, old, target = draw().requires_grad_(), draw(), draw()
    for function in (ppo.policy_loss, ppo.value_loss):
        assert torch.autograd.gradcheck(
            lambda x, f=function: f(x, old, target, mask, 0.2)[0], (x,)
        )


@pytest.mark.parametrize("seed", range(5))
def test_value_loss_token_by_token(seed):
    draw, mask = random_case(seed)
    values, old, returns = draw() * 0.5, draw() * 0.5, draw()
    loss, stats = ppo.value_loss(values, old, returns, mask, clip_range=0.2)
    losses, clipped = [], []
    for place in tokens(mask):
        v, v_old, g = (x[place].item() for x in (values, old, returns))
        near_old = min(max(v, v_old - 0.2), v_old + 0.2)
        losses.append(0.5 * max((v - g) ** 2, (near_old - g) ** 2))
        clipped.append((near_old - g) ** 2 > (v - g) ** 2)
    n = len(losses)
    assert loss.item() == pytest.approx(sum(losses) / n, abs=1e-12)
    fraction = stats["value_clip_fraction"].item()
    assert fraction == pytest.approx(sum(clipped) / n, abs=1e-12)
    assert 0 < fraction < 1


def test_what_holds_if_nothing_else_is_named():
    """gamma 1, lambda 0.95, a clip range of 0.2, temperature 1, k1: by hand."""
    mask = t([1, 1])
    # delta_1 = 1 - 0.5, and delta_0 = 1 * 0.5 - 0
    advantages, returns = ppo.compute_gae(t([0.0, 1.0]), t([0.0, 0.5]), mask)
    torch.testing.assert_close(advantages, t([0.5 + 0.95 * 0.5, 0.5]), **EXACT)
    torch.testing.assert_close(returns, t([0.975, 1.0]), **EXACT)
    moved = t([math.log(1.5), math.log(0.5)])
    loss, _ = ppo.policy_loss(moved, t([0.0, 0.0]), t([1.0, -3.0]), mask)
    assert loss.item() == pytest.approx((-1.2 + 3 * 0.8) / 2, abs=1e-12)
    loss, _ = ppo.value_loss(t([1.0, -1.0]), t([0.0, 0.0]), t([1.0, -3.0]), mask)
    assert loss.item() == pytest.approx(0.5 * (0.8**2 + 2.8**2) / 2, abs=1e-12)
    logits, label = t([0.0, math.log(3.0)]), torch.tensor([1])
    assert ppo.token_logprobs(logits, label).exp().item() == pytest.approx(0.75)
    assert ppo.kl_estimate(t([-2.0]), t([-0.5])).item() == -1.5


def test_entropy_by_hand():
    logits = torch.zeros(1, 3, 4, dtype=torch.float64)
    logits[0, 1] = torch.tensor([0.0, float("-inf"), float("-inf"), 0.0])
    logits[0, 2] = float("nan")  # outside the mask
    got = ppo.entropy(logits, t([1, 1, 0]))
    assert got.item() == pytest.approx((math.log(4) + math.log(2)) / 2, abs=1e-12)


def test_explained_variance_by_hand():
    returns, mask = t([1.0, 2.0, 3.0, 99.0]), t([1, 1, 1, 0])
    assert ppo.explained_variance(returns, returns, mask).item() == 1.0
    assert ppo.explained_variance(t([5.0] * 4), returns, mask).item() == 0.0
    # residuals 1, 0, 1: variance 2/9 of 2/3
    got = ppo.explained_variance(t([0.0, 2.0, 2.0, 0.0]), returns, mask).item()
    assert got == pytest.approx(1 - (2 / 9) / (2 / 3), abs=1e-12)


@pytest.mark.parametrize("constant", [0.0, 0.1, 12345.678])
def test_explained_variance_of_constant_returns_is_zero(constant):
    returns, values = torch.full((3, 7), constant), torch.randn(3, 7)
    share = ppo.explained_variance(values.requires_grad_(), returns, torch.ones(3, 7))
    assert share == 0
    share.backward()
    assert values.grad.eq(0).all()


@pytest.mark.parametrize("scale", [1e-20, 1e-5, 1.0, 1e5, 1e12])
def test_explained_variance_has_no_unit(scale):
    returns, values = t([1.0, 2.0, 3.0]), t([0.0, 2.0, 2.0])
    got = ppo.explained_variance(values * scale, returns * scale, t([1, 1, 1]))
    assert got.item() == pytest.approx(1 - (2 / 9) / (2 / 3), abs=1e-12)


def test_returns_vary_from_a_hundred_thousandth_of_their_size_on():
    for spread, expected in ((1.2e-5, 1.0), (0.8e-5, 0.0)):
        returns = t([7 * (1 + spread), 7 * (1 - spread), 1e6])
        assert ppo.explained_variance(returns, returns, t([1, 1, 0])) == expected


def test_adaptive_kl_by_hand():
    """10 % above the target, then far above, then far below; each from the last."""
    control, expected = ppo.AdaptiveKL(kl_coef=0.2, target=6.0, horizon=10_000), 0.2
    for kl, error in ((6.6, 0.1), (60.0, 0.2), (0.0, -0.2)):
        expected *= 1 + error * 0.05
        assert control.update(kl, n_episodes=500) == pytest.approx(expected)
        assert control.kl_coef == pytest.approx(expected)


FUNCTIONS = {  # name: (function of token-shaped tensors and mask, how many tensors)
    "masked_mean": (ppo.masked_mean, 1),
    "masked_var": (ppo.masked_var, 1),
    "masked_whiten": (ppo.masked_whiten, 1),
    "token_rewards": (
        lambda a, b, m: ppo.token_rewards(torch.ones(len(m)).double(), a, b, m, 0.1),
        2,
    ),
    "compute_gae": (lambda a, b, m: torch.stack(ppo.compute_gae(a, b, m)), 2),
    "policy_loss": (lambda a, b, c, m: ppo.policy_loss(a, b, c, m)[0], 3),
    "value_loss": (lambda a, b, c, m: ppo.value_loss(a, b, c, m)[0], 3),
    "explained_variance": (ppo.explained_variance, 2),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_nothing_outside_the_mask_matters(name, value):
    function, count = FUNCTIONS[name]
    draw, mask = random_case(3)
    clean = [draw() for _ in range(count)]
    dirty = [poison(x, mask, value).requires_grad_() for x in clean]
    clean = [x.requires_grad_() for x in clean]
    expected, got = function(*clean, mask), function(*dirty, mask)
    assert torch.equal(expected, got)
    if got.requires_grad:
        expected.sum().backward()
        got.sum().backward()
        for a, b in zip(clean, dirty, strict=True):
            if a.grad is not None:
                assert torch.equal(a.grad, b.grad)
                assert b.grad[mask == 0].eq(0).all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_padding_on_either_side_changes_nothing(name):
    function, count = FUNCTIONS[name]
    draw, mask = random_case(4)
    tensors = [draw() for _ in range(count)]
    expected = function(*tensors, mask)
    widen = torch.nn.ConstantPad1d((2, 3), 0)
    noisy = torch.nn.ConstantPad1d((2, 3), 7.0)
    got = function(*(noisy(x) for x in tensors), widen(mask))
    if got.dim():
        assert got[..., :2].eq(0).all() and got[..., -3:].eq(0).all()
        got = got[..., 2:-3]
    torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_order_of_the_responses_changes_nothing(name):
    """No result and no gradient; what is token-shaped is permuted along."""
    function, count = FUNCTIONS[name]
    draw, mask = random_case(5)
    order = torch.tensor([3, 0, 4, 1, 2])
    tensors = [draw() for _ in range(count)]
    results = []
    for rows in (torch.arange(5), order):
        inputs = [x[rows].requires_grad_() for x in tensors]
        out = function(*inputs, mask[rows])
        if out.requires_grad:
            (out * torch.linspace(1, 2, 7)).sum().backward()
        grads = [x.grad for x in inputs if x.grad is not None]
        results.append((out.detach(), grads))
    (out, grads), (other, other_grads) = results
    place = order if out.dim() else slice(None)
    out = out[:, place] if out.dim() == 3 else out[place] if out.dim() else out
    torch.testing.assert_close(other, out, **EXACT)
    for a, b in zip(grads, other_grads, strict=True):
        torch.testing.assert_close(b, a[order], **EXACT)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("shape", [(2, 4), (2, 1)])
def test_shapes_that_disagree_are_named(name, shape):
    """Whichever tensor it is, and also where torch would stretch it to fit."""
    function, count = FUNCTIONS[name]
    for odd in range(count + 1):
        shapes = [shape if i == odd else (2, 3) for i in range(count + 1)]
        with pytest.raises(ValueError) as error:
            function(*(torch.ones(s).double() for s in shapes))
        assert " (2, 3)" in str(error.value) and f" {shape}" in str(error.value)


def test_other_bad_arguments_are_named():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"'k4'.*\(2, 3\)"):
        ppo.kl_estimate(x, x, kind="k4")
    with pytest.raises(ValueError, match=r"logprobs \(2, 3\).*logprobs \(2, 1\)"):
        ppo.kl_estimate(x, x[:, :1])
    with pytest.raises(ValueError, match=r"scores \(3,\).*\(2,\)"):
        ppo.token_rewards(torch.zeros(3), x, x, x, 0.1)
    with pytest.raises(ValueError, match=r"\(2,\).*\(3,\)"):
        ppo.token_logprobs(torch.zeros(2, 5), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="temperature.*0"):
        ppo.token_logprobs(torch.zeros(2, 5), torch.zeros(2, dtype=torch.long), 0)
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\)"):
        ppo.entropy(torch.zeros(2, 3, 5), torch.ones(2, 4))
    good = {"kl_coef": 0.1, "target": 6.0, "horizon": 100}
    for name, bad in itertools.product(good, (0, -1, float("nan"))):
        with pytest.raises(ValueError, match=f"{name} must be positive, got {bad}"):
            ppo.AdaptiveKL(**{**good, name: bad})


def test_entropy_has_a_gradient_where_a_probability_underflows():
    logits = torch.tensor([[[0.0, -200.0, -3.0]]], requires_grad=True)
    ppo.entropy(logits, torch.ones(1, 1)).backward()
    p = torch.tensor([0.0, -3.0]).softmax(0)
    H = -(p * p.log()).sum()
    expected = -p * (p.log() + H)
    torch.testing.assert_close(logits.grad[0, 0, [0, 2]], expected)
    assert logits.grad[0, 0, 1] == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_entropy_outside_the_mask_has_no_gradient(value):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    mask, results = t([1, 1, 0], [1, 0, 0]), []
    for x in (logits, logits.masked_fill(mask[..., None] == 0, value)):
        H = ppo.entropy(x.requires_grad_(), mask)
        H.backward()
        results.append((H, x.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[1][1][mask == 0].eq(0).all()


def test_the_largest_ratio_is_that_of_a_real_token():
    logprobs, mask = t([0.5, 0.25, 9.0]).log(), t([1, 1, 0])
    _, stats = ppo.policy_loss(logprobs, t([0.0] * 3), t([1.0] * 3), mask)
    assert stats["ratio_max"].item() == pytest.approx(0.5, abs=1e-12)
