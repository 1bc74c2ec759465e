"""Checks of PPO's pieces, for pytest and for learners: `check_gae(my_function)`.

Each check draws inputs from a seed, works the answer out from a definition of its
own, token by token in plain Python, and prints the largest difference. Where a
function is wrong, it names the known mistake that gives the same answer. Nothing here
uses `utils.ppo`: an expectation made by the code under test would prove nothing.

    check_gae(my_gae)                    # prints one line, never raises
    assert check_gae(my_gae, seed=7)     # in a test

Any callable with the arguments of the function in `utils` will do.
"""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import nn

TOLERANCE = 1e-5  # float32's on numbers near 1; the known mistakes are far larger


@dataclass(frozen=True)
class Result:
    """The outcome of a check, true if it passed; it has been printed already."""

    passed: bool
    difference: float  # the largest; inf if there was nothing to compare with
    message: str  # what is wrong, or empty

    def __bool__(self):
        return self.passed

    def _ipython_display_(self):
        """Show nothing: as the last value of a cell it would be printed twice."""


def compare(name: str, call, expected: dict, mistakes=(), tolerances=None) -> Result:
    """Compare what `call()` returns with what is expected, and print the outcome.

    `expected` maps the name of each quantity to a tensor or number; `call()` must
    return the same names. `mistakes` holds pairs of a sentence, as it goes on after
    "this is what you get when", and the quantities after that mistake; it is named if
    it explains the first wrong quantity and agrees on all that it lists. `tolerances`
    maps names of quantities to bounds other than `TOLERANCE`.
    """
    expected = _as_tensors(expected)
    try:
        got = call()
        if missing := [key for key in expected if key not in got]:
            return _failed(name, math.inf, f"it gives no {' and no '.join(missing)}")
        got = _as_tensors({key: got[key] for key in expected})
    except Exception as error:  # a learner's function may fail in any way
        return _failed(name, math.inf, f"it raised {type(error).__name__}: {error}")
    for key, value in expected.items():
        if got[key].shape != value.shape:
            shapes = f"{tuple(got[key].shape)}, expected {tuple(value.shape)}"
            return _failed(name, math.inf, f"its {key} has the shape {shapes}")

    def same(key, value):
        return _difference(got[key], value) <= (tolerances or {}).get(key, TOLERANCE)

    wrong = [key for key, value in expected.items() if not same(key, value)]
    # What has a bound of its own (a sample, float32) would hide the rest
    compared = wrong or [key for key in expected if key not in (tolerances or {})]
    compared = compared or list(expected)
    largest = max(_difference(got[key], expected[key]) for key in compared)
    if not wrong:
        print(f"✓ {name}: largest difference {largest:.1e}")
        return Result(True, largest, "")
    for sentence, changed in mistakes:
        changed = _as_tensors(changed)
        if wrong[0] in changed and all(same(*item) for item in changed.items()):
            message = f"this is what you get when {sentence}"
            return _failed(name, largest, message)
    message = _where(wrong[0], got[wrong[0]], expected[wrong[0]])
    return _failed(name, largest, message)


def _failed(name, difference, message):
    print(f"✗ {name}: largest difference {difference:.1e}; {message}")
    return Result(False, difference, message)


def _as_tensors(quantities):
    return {
        key: torch.as_tensor(value, dtype=torch.float64, device="cpu").detach()
        for key, value in quantities.items()
    }


def _difference(a, b):
    gap = (a - b).abs().max().item()
    return math.inf if math.isnan(gap) else gap


def _where(key, got, expected):
    worst = (got - expected).abs().nan_to_num(math.inf).argmax()
    index = [i.item() for i in torch.unravel_index(worst, got.shape)]
    yours, right = got.flatten()[worst].item(), expected.flatten()[worst].item()
    return f"its {key}{index or ''} is {yours:.4f}, expected {right:.4f}"


def _name(function):
    return getattr(function, "__name__", "your function")


class _Case:
    """Random responses: one ends at once, one never does, the others in between.

    What stands outside the mask is as large as what stands inside, so that a slot
    too many shows.
    """

    def __init__(self, seed, batch=5, length=7):
        self.generator = torch.Generator().manual_seed(seed)
        between = torch.randint(2, length, (batch - 2,), generator=self.generator)
        self.lengths = [1, length, *between.tolist()]
        self.width, self.n_tokens = length, sum(self.lengths)
        ends = torch.tensor(self.lengths)[:, None]
        self.mask = (torch.arange(length) < ends).long()

    def normal(self, *shape):
        shape = shape or self.mask.shape
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def integers(self, low, high, shape):
        return torch.randint(low, high, shape, generator=self.generator)

    def uniform(self, low, high):
        return low + (high - low) * torch.rand((), generator=self.generator).item()

    def rows(self, *tensors):
        """The real tokens of each response: one list of numbers for each tensor."""
        return [
            [x[b, :n].tolist() for x in tensors] for b, n in enumerate(self.lengths)
        ]

    def table(self, rows):
        """Lists of numbers as a (B, T) tensor, 0 outside the mask."""
        out = torch.zeros(self.mask.shape, dtype=torch.float64)
        for b, row in enumerate(rows):
            out[b, : len(row)] = torch.tensor(row, dtype=torch.float64)
        return out


def _mean(numbers):
    return sum(numbers) / len(numbers)


def _added(rows, others):
    return [
        [a + b for a, b in zip(*pair, strict=True)]
        for pair in zip(rows, others, strict=True)
    ]


def _whiten(rows, centre=True, power=0.5, lost=0):
    """Rows of numbers less their mean, by their variance (over n - lost) ** power."""
    numbers = [x for row in rows for x in row]
    mean = _mean(numbers)
    variance = sum((x - mean) ** 2 for x in numbers) / (len(numbers) - lost)
    return [[(x - centre * mean) / variance**power for x in row] for row in rows]


def check_whiten(function, seed: int = 0) -> Result:
    """`masked_whiten(x, mask)`: mean 0 and population variance 1 over the mask."""
    case = _Case(seed)
    x = 3 + 2 * case.normal()
    rows = [row for (row,) in case.rows(x)]
    mean = _mean([number for row in rows for number in row])
    over_slots = torch.tensor(_whiten(x.tolist()), dtype=torch.float64)
    white = case.table(_whiten(rows))
    mistakes = [
        ("the mean is added back", white + mean * case.mask),
        ("padding is counted in the mean and variance", over_slots * case.mask),
        ("padding is counted, and whitened too", over_slots),
        ("the variance is divided by n - 1, not n", case.table(_whiten(rows, lost=1))),
        ("the mean is not taken away", case.table(_whiten(rows, centre=False))),
        ("the variance is not made 1", case.table(_whiten(rows, power=0))),
        (
            "the divisor is the variance, not its root",
            case.table(_whiten(rows, power=1)),
        ),
    ]
    return compare(
        _name(function),
        lambda: {"result": function(x.clone(), case.mask.clone())},
        {"result": white},
        [(sentence, {"result": value}) for sentence, value in mistakes],
    )


def _gae(rewards, values, gamma, lam, after=0.0):
    """A_t as the explicit sum of the TD errors that follow (GAE, equation 16)."""
    n, V = len(rewards), [*values, after]
    delta = [rewards[t] + gamma * V[t + 1] - V[t] for t in range(n)]
    weights = [(gamma * lam) ** k for k in range(n)]
    return [sum(weights[k] * delta[t + k] for k in range(n - t)) for t in range(n)]


def check_gae(function, seed: int = 0) -> Result:
    """`compute_gae(rewards, values, mask, gamma, lam)` -> advantages, returns."""
    case = _Case(seed)
    rewards, values = case.normal(), case.normal()
    gamma, lam = case.uniform(0.7, 0.95), case.uniform(0.3, 0.9)
    pairs = case.rows(rewards, values)
    V = [row for _, row in pairs]
    late_V = [[*row[1:], 0.0] for row in V]
    all_slots = zip(rewards.tolist(), values.tolist(), case.lengths, strict=True)
    behind = [[*row, 0.0][n] for row, n in zip(values, case.lengths, strict=True)]

    def answer(advantages, returns):
        return {"advantages": case.table(advantages), "returns": case.table(returns)}

    def variant(gamma=gamma, lam=lam):
        A = [_gae(r, v, gamma, lam) for r, v in pairs]
        return answer(A, _added(A, V))

    right = [_gae(r, v, gamma, lam) for r, v in pairs]
    white = _whiten(right)
    late = [_gae(r, v, gamma, lam) for (r, _), v in zip(pairs, late_V, strict=True)]
    forward = [_gae(r[::-1], v[::-1], gamma, lam)[::-1] for r, v in pairs]
    padded = [_gae(r, v, gamma, lam)[:n] for r, v, n in all_slots]
    bootstrapped = [
        _gae(r, v, gamma, lam, after)
        for (r, v), after in zip(pairs, behind, strict=True)
    ]
    whitened_first = "the advantages are whitened first, before the returns are formed"
    late_values = "the values are read one slot late"
    mistakes = [
        (whitened_first, answer(white, _added(white, V))),
        (whitened_first, answer(right, _added(white, V))),
        ("the advantages come out whitened", answer(white, _added(right, V))),
        (late_values, answer(late, _added(late, V))),
        (late_values, answer(late, _added(late, late_V))),
        ("the sum runs on into the padding", answer(padded, _added(padded, V))),
        (
            "the slot behind EOS has a value; nothing more is to come, so it is 0",
            answer(bootstrapped, _added(bootstrapped, V)),
        ),
        ("lambda is left out", variant(lam=1.0)),
        ("gamma is left out", variant(gamma=1.0)),
        ("only the TD error of the token itself counts", variant(lam=0.0)),
        ("the sum runs from first token to last", answer(forward, _added(forward, V))),
        ("the returns lack the values: G = A + V", answer(right, right)),
    ]

    def call():
        tensors = (rewards.clone(), values.clone(), case.mask.clone())
        advantages, returns = function(*tensors, gamma, lam)
        return {"advantages": advantages, "returns": returns}

    return compare(_name(function), call, answer(right, _added(right, V)), mistakes)


def _loss(case, rows, token_loss, mean_over="tokens"):
    """A loss that is a mean over tokens, and its gradient by finite differences.

    `token_loss` takes the numbers of one token; the gradient is with respect to the
    first of them.
    """
    h, total, slopes = 1e-5, 0.0, []
    for row, n in zip(rows, case.lengths, strict=True):
        count = {"tokens": case.n_tokens, "slots": case.mask.numel()}
        weight = 1 / count.get(mean_over, n * len(rows))
        tokens = list(zip(*row, strict=True))
        total += sum(weight * token_loss(*token) for token in tokens)
        rises = [token_loss(x + h, *y) - token_loss(x - h, *y) for x, *y in tokens]
        slopes.append([weight * rise / (2 * h) for rise in rises])
    return {"loss": total, "gradient": case.table(slopes)}


def _loss_mistakes(case, tensors, token_loss):
    """What can go wrong around any loss that is a mean over tokens."""
    rows = case.rows(*tensors)
    with_padding = list(zip(*(x.tolist() for x in tensors), strict=True))
    return [
        (
            "there is no mask: padding counts like a token",
            _loss(case, with_padding, token_loss, "slots"),
        ),
        (
            "the sum is divided by the number of all slots, not of the real tokens",
            _loss(case, rows, token_loss, "slots"),
        ),
        (
            "each response weighs the same; in PPO each token does",
            _loss(case, rows, token_loss, "rows"),
        ),
        (
            "the loss has no gradient (detached, or made under no_grad?)",
            {"gradient": torch.zeros(case.mask.shape)},
        ),
    ]


def _call_loss(function, x, *others):
    """Loss, gradient with respect to x, and statistics of a loss function."""
    x = x.clone().requires_grad_()
    result = function(x, *others)
    loss, stats = result if isinstance(result, tuple) else (result, {})
    gradient = torch.zeros_like(x)
    if loss.requires_grad:
        (gradient,) = torch.autograd.grad(loss, x)
    return {"loss": loss, "gradient": gradient, **stats}


def check_policy_loss(function, seed: int = 0) -> Result:
    """`policy_loss(logprobs, old_logprobs, advantages, mask, clip_range)`.

    Loss, gradient with respect to `logprobs`, and the statistics.
    """
    case = _Case(seed)
    clip = case.uniform(0.1, 0.3)
    old, step, advantages = -1 - case.normal().abs(), 0.3 * case.normal(), case.normal()
    # In the longest response: far up and far down, of praised and blamed tokens
    step[1, :4] = case.uniform(1, 1.3) * torch.tensor([0.5, 0.5, -0.7, -0.7])
    advantages[1, :4] = case.uniform(0.5, 1.5) * torch.tensor([1.0, -1.0, 1.0, -1.0])
    rows = case.rows(old + step, old, advantages)

    def near(ratio):
        return min(max(ratio, 1 - clip), 1 + clip)

    def surrogate(pick=max, sign=1, turn=1, clipped=near):
        def token_loss(new, old, A):
            ratio = math.exp(turn * (new - old))
            return pick(-sign * A * ratio, -sign * A * clipped(ratio))

        return token_loss

    def clipped_in_logs(ratio):
        return math.exp(min(max(math.log(ratio), -clip), clip))

    def mistake(sentence, **changes):
        return sentence, _loss(case, rows, surrogate(**changes))

    tokens = [token for row in rows for token in zip(*row, strict=True)]
    ratios = [math.exp(new - old) for new, old, _ in tokens]
    gains = [A for *_, A in tokens]
    expected = {
        **_loss(case, rows, surrogate()),
        "approx_kl": _mean([r - 1 - math.log(r) for r in ratios]),
        "clip_fraction": _mean(
            [-A * near(r) > -A * r for A, r in zip(gains, ratios, strict=True)]
        ),
        "ratio_mean": _mean(ratios),
        "ratio_max": max(ratios),
    }
    turned_kl = _mean([1 / r - 1 + math.log(r) for r in ratios])
    mistakes = [
        mistake("min stands for max (a loss takes the larger)", pick=min),
        mistake("the sign is turned: worse tokens become likelier", sign=-1),
        mistake("the sign is turned, and min stands for max", sign=-1, pick=min),
        mistake("the ratio is not clipped", clipped=lambda ratio: ratio),
        mistake(
            "only the clipped branch is there", pick=lambda plain, clipped: clipped
        ),
        mistake("log rho is clipped, not rho", clipped=clipped_in_logs),
        mistake("the ratio is turned around: rho = pi_theta / pi_old", turn=-1),
        *_loss_mistakes(case, (old + step, old, advantages), surrogate()),
        ("approx_kl is turned around; pi_old sampled", {"approx_kl": turned_kl}),
    ]
    return compare(
        _name(function),
        lambda: _call_loss(function, old + step, old, advantages, case.mask, clip),
        expected,
        mistakes,
    )


def check_value_loss(function, seed: int = 0) -> Result:
    """`value_loss(values, old_values, returns, mask, clip_range)`.

    Loss, gradient with respect to `values`, and the share of clipped tokens.
    """
    case = _Case(seed)
    clip = case.uniform(0.1, 0.3)
    old, step, returns = case.normal(), 0.3 * case.normal(), case.normal()
    # In the longest response: moved far, towards the return and past it
    step[1, :4] = case.uniform(1, 1.3) * torch.tensor([0.6, -0.6, 0.6, -0.6])
    returns[1, :4] = old[1, :4] + torch.tensor([2.0, -2.0, -1.0, 1.0])
    rows = case.rows(old + step, old, returns)

    def near(x, centre):
        return min(max(x, centre - clip), centre + clip)

    def squared(pick=max, centre=lambda old: old, half=0.5):
        def token_loss(V, old, G):
            return half * pick((V - G) ** 2, (near(V, centre(old)) - G) ** 2)

        return token_loss

    def mistake(sentence, **changes):
        return sentence, _loss(case, rows, squared(**changes))

    tokens = [token for row in rows for token in zip(*row, strict=True)]
    bound = [(near(V, old) - G) ** 2 > (V - G) ** 2 for V, old, G in tokens]
    mistakes = [
        mistake(
            "nothing is clipped (around the return nothing ever is; clip around the "
            "old value)",
            pick=lambda plain, clipped: plain,
        ),
        mistake(
            "the value is clipped around 0, not around the old value",
            centre=lambda old: 0.0,
        ),
        mistake("min stands for max of the two errors", pick=min),
        mistake("only the clipped error is there", pick=lambda plain, clipped: clipped),
        mistake("the factor 1/2 is left out", half=1.0),
        *_loss_mistakes(case, (old + step, old, returns), squared()),
    ]
    return compare(
        _name(function),
        lambda: _call_loss(function, old + step, old, returns, case.mask, clip),
        {**_loss(case, rows, squared()), "value_clip_fraction": _mean(bound)},
        mistakes,
    )


def check_token_rewards(function, seed: int = 0) -> Result:
    """`token_rewards(scores, logprobs, ref_logprobs, mask, kl_coef)` -> (B, T)."""
    case = _Case(seed)
    logprobs, ref = -case.normal().abs(), -case.normal().abs()
    scores, beta = case.normal(len(case.lengths)), case.uniform(0.1, 0.5)

    def rewards(price=-beta, place=lambda n: n - 1, kl=lambda ratio: ratio):
        """Rewards of all slots, the score at slot `place(n)` of a response's n tokens.

        Where that slot does not exist, the score is lost.
        """
        table = torch.zeros(case.mask.shape, dtype=torch.float64)
        for b, (new, old) in enumerate(case.rows(logprobs, ref)):
            for t, ratio in enumerate(a - b for a, b in zip(new, old, strict=True)):
                table[b, t] = price * kl(ratio)
            if 0 <= place(len(new)) < case.width:
                table[b, place(len(new))] += scores[b]
        return table

    def k3(ratio):
        return math.exp(-ratio) - 1 + ratio

    right, no_score = rewards(), rewards(place=lambda n: -1)
    last = case.width - 1
    behind = "the score stands on the slot after EOS"
    mistakes = [
        ("the sign of the KL is turned", rewards(price=beta)),
        (behind, rewards(place=lambda n: n)),
        (behind, rewards(place=lambda n: min(n, last))),
        (
            "the score stands on the last slot, padding or not",
            rewards(place=lambda n: last),
        ),
        ("the score stands on the first token", rewards(place=lambda n: 0)),
        ("every token gets the score", no_score + scores[:, None] * case.mask),
        ("the score is left out", no_score),
        ("the KL coefficient is left out", rewards(price=-1.0)),
        ("the KL penalty is left out", rewards(price=0.0)),
        (
            "padding pays for its KL, too",
            torch.where(case.mask.bool(), right, -beta * (logprobs - ref)),
        ),
        (
            "k3 stands for k1; only k1 adds up to the response's log-ratio",
            rewards(kl=k3),
        ),
    ]
    return compare(
        _name(function),
        lambda: {"rewards": function(scores, logprobs, ref, case.mask, beta)},
        {"rewards": right},
        [(sentence, {"rewards": value}) for sentence, value in mistakes],
    )


def check_kl_estimate(function, seed: int = 0) -> Result:
    """`kl_estimate(logprobs, ref_logprobs, kind)` for k1, k2 and k3.

    On every word of a small vocabulary, so that the means under the policy can be
    compared with the exact KL, summed over the words.
    """
    case = _Case(seed)
    p, q = case.normal(3, 5).softmax(dim=-1), case.normal(3, 5).softmax(dim=-1)
    pairs = [
        zip(*rows, strict=True) for rows in zip(p.tolist(), q.tolist(), strict=True)
    ]
    words = [[(a, math.log(a / b)) for a, b in row] for row in pairs]
    exact = [sum(a * ratio for a, ratio in row) for row in words]

    def each(estimate):
        rows = [[estimate(ratio) for _, ratio in row] for row in words]
        return torch.tensor(rows, dtype=torch.float64)

    def k3(ratio):
        return math.exp(-ratio) - 1 + ratio

    expected = {
        "k1": each(lambda ratio: ratio),
        "k2": each(lambda ratio: ratio**2 / 2),
        "k3": each(k3),
        "mean of k1": exact,
        "mean of k3": exact,
    }
    mistakes = [
        ("the sign of k1 is turned", {"k1": each(lambda ratio: -ratio)}),
        ("k1 is made positive; only its mean is", {"k1": each(abs)}),
        ("the factor 1/2 of k2 is left out", {"k2": each(lambda ratio: ratio**2)}),
        (
            "k3 takes the log-ratio reversed; its mean is then not KL(pi || pi_ref)",
            {"k3": each(lambda ratio: k3(-ratio))},
        ),
        ("k3 lacks its last term", {"k3": each(lambda ratio: k3(ratio) - ratio)}),
        ("the sign of k3 is turned", {"k3": each(lambda ratio: -k3(ratio))}),
    ]

    def call():
        got = {kind: function(p.log(), q.log(), kind) for kind in ("k1", "k2", "k3")}
        means = {f"mean of {kind}": (p * got[kind]).sum(1) for kind in ("k1", "k3")}
        return {**got, **means}

    return compare(_name(function), call, expected, mistakes)


def _log_softmax(logits, label):
    largest = max(logits)
    return (
        logits[label] - largest - math.log(sum(math.exp(x - largest) for x in logits))
    )


def check_token_logprobs(function, seed: int = 0) -> Result:
    """`token_logprobs(logits, labels, temperature)`: (B, T, V), (B, T) -> (B, T)."""
    case = _Case(seed)
    logits = 2 * case.normal(3, 5, 7)
    labels = case.integers(0, 7, (3, 5))
    tau = case.uniform(1.3, 2.5)
    low = (logits - 100).float()  # where GPT-2's logits lie
    at_tau, near_100 = "result at another temperature", "result at logits near -100"

    def logprobs(logits, labels):
        places = zip(logits.flatten(0, 1).tolist(), labels.flatten(), strict=True)
        numbers = [_log_softmax(x, i) for x, i in places]
        return torch.tensor(numbers, dtype=torch.float64).view(labels.shape)

    right = logprobs(logits, labels)
    picked = logits.gather(-1, labels[..., None])[..., 0]
    mistakes = [
        (
            "the label is the next slot's",
            {"result": logprobs(logits, labels.roll(-1, 1))},
        ),
        (
            "the label is the previous slot's",
            {"result": logprobs(logits, labels.roll(1, 1))},
        ),
        ("the logarithm is left out", {"result": right.exp()}),
        ("the logits are not normalised (log-softmax)", {"result": picked}),
        ("the sign is turned", {"result": -right}),
        ("the temperature is left out", {at_tau: right}),
        ("the logits are multiplied by tau", {at_tau: logprobs(logits * tau, labels)}),
        ("the log-probabilities, not the logits, are divided", {at_tau: right / tau}),
    ]

    def call():
        return {
            "result": function(logits.clone(), labels),
            at_tau: function(logits.clone(), labels, tau),
            near_100: function(low.clone(), labels),
        }

    expected = {
        "result": right,
        at_tau: logprobs(logits / tau, labels),
        near_100: right,
    }
    return compare(_name(function), call, expected, mistakes, {near_100: 1e-4})


def check_lm_labels(function, seed: int = 0) -> Result:
    """`lm_labels(input_ids, attention_mask)` where the padding is EOS, as in GPT-2."""
    case, eos = _Case(seed), 9
    last = torch.tensor(case.lengths)[:, None] - 1
    ids = case.integers(0, eos, case.mask.shape)
    ids = ids.where(torch.arange(case.width) < last, eos)
    labels = ids.where(case.mask == 1, -100)
    shifted = labels.roll(-1, dims=1).where(torch.arange(case.width) < last, -100)
    mistakes = [
        (
            "padding is found by id == eos: the label of the closing EOS is lost",
            {"labels": ids.where(ids != eos, -100)},
        ),
        ("padding keeps its labels; set them to -100", {"labels": ids}),
        ("the labels are shifted; the model shifts them itself", {"labels": shifted}),
    ]
    return compare(
        _name(function),
        lambda: {"labels": function(ids.clone(), case.mask.clone())},
        {"labels": labels},
        mistakes,
    )


class _Trunk(nn.Module):
    """The hidden state at a place depends on its position and on all tokens up to it,
    so that a place too far to either side shows.
    """

    def __init__(self, words, places):
        super().__init__()
        self.words, self.places = nn.Embedding.from_pretrained(words), places

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        **_,
    ):
        words = self.words(input_ids) if inputs_embeds is None else inputs_embeds
        if attention_mask is None:
            attention_mask = torch.ones(words.shape[:2])
        if position_ids is None:
            position_ids = torch.arange(words.shape[1]).expand(words.shape[:2])
        seen = (words * attention_mask[..., None]).cumsum(dim=1)
        hidden = torch.tanh(seen / 2 + self.places[position_ids])
        return SimpleNamespace(last_hidden_state=hidden)

    def get_input_embeddings(self):
        return self.words


class _Model(nn.Module):
    """A causal language model of tables, called like those of transformers."""

    def __init__(self, case, n_words, size, n_places):
        super().__init__()
        self.base_model = _Trunk(
            case.normal(n_words, size), case.normal(n_places, size)
        )
        self.head = nn.Linear(size, n_words, bias=False, dtype=torch.float64)
        self.head.weight.data = case.normal(n_words, size)

    def forward(self, *arguments, **options):
        hidden = self.base_model(*arguments, **options).last_hidden_state
        return SimpleNamespace(logits=self.head(hidden))

    def get_output_embeddings(self):
        return self.head


@torch.no_grad()
def check_evaluate_responses(function, seed: int = 0) -> Result:
    """`evaluate_responses(policy, input_ids, attention_mask, mask, temperature)`.

    Log-probabilities and values (B, T) of responses to left-padded prompts, against
    each text alone. `policy` has an `lm` and a `value_head`.
    """
    case, n_words, eos = _Case(seed), 6, 0
    prompts = [1, 4, *case.integers(1, 5, (len(case.lengths) - 2,)).tolist()]
    left = torch.arange(4) >= 4 - torch.tensor(prompts)[:, None]
    attention_mask = torch.cat([left.long(), case.mask], dim=1)
    ids = case.integers(1, n_words, attention_mask.shape)
    for b, n in enumerate(case.lengths):
        if n < case.width:  # the longest response never ends
            ids[b, 4 + n - 1 :] = eos
    ids[~attention_mask.bool()] = eos
    tau, width = case.uniform(1.3, 2.0), attention_mask.shape[1]
    lm, weights = _Model(case, n_words, 4, width + 4), case.normal(4)
    policy = SimpleNamespace(lm=lm, value_head=lambda hidden: hidden @ weights)

    def answer(late=0, tau=tau, padding_counts=False, skip=None):
        """Log-probabilities and values of each text alone."""
        logprobs, values = [], []
        for b, n in enumerate(case.lengths):
            text = ids[b][attention_mask[b].bool()]
            places = torch.arange(len(text)) + padding_counts * (4 - prompts[b])
            hidden = lm.base_model(text[None], None, places[None]).last_hidden_state[0]
            logits = (lm.head(hidden) / tau).tolist()
            first = prompts[b] - 1 + late  # the place that predicts the first token
            predicted = zip(logits[first : first + n], text[prompts[b] :], strict=True)
            logprobs.append([_log_softmax(x, i) * (i != skip) for x, i in predicted])
            values.append((hidden[first : first + n] @ weights).tolist())
        return {"logprobs": case.table(logprobs), "values": case.table(values)}

    late = answer(late=1)
    mistakes = [
        (
            "the log-probabilities are shifted by one: logits predict the next token",
            {"logprobs": late["logprobs"]},
        ),
        (
            "the values are read one slot late, when the token has been chosen",
            {"values": late["values"]},
        ),
        (
            "the mask is built from id == eos: the closing EOS is lost",
            {"logprobs": answer(skip=eos)["logprobs"]},
        ),
        ("the positions count the padding on the left", answer(padding_counts=True)),
        ("the temperature is left out", {"logprobs": answer(tau=1.0)["logprobs"]}),
    ]

    def call():
        logprobs, values = function(policy, ids, attention_mask, case.mask, tau)
        return {"logprobs": logprobs, "values": values}

    return compare(_name(function), call, answer(), mistakes)


@torch.no_grad()
def check_reward_head(cls, seed: int = 0) -> Result:
    """`RewardHead(hidden_size)`: (..., d) -> (...), N(0, 1/sqrt(d + 1)), bias 0.

    The weights are a sample: mean and spread may be off by 5 standard errors.
    """
    d, heads, roots = 512, 8, math.sqrt(513)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = [cls(d) for _ in range(heads)]
        hidden = torch.randn(2, 3, d)

    def call():
        zero, unit = torch.zeros(1, d), torch.eye(d)
        bias = torch.stack([head(zero).view(()) for head in made])
        weight = torch.stack([head(unit).view(d) for head in made]) - bias[:, None]
        output = made[0](hidden)
        linear = hidden @ weight[0] + bias[0]
        return {
            "share of weights that are 0": (weight == 0).double().mean(),
            "spread * sqrt(d + 1)": weight.std() * roots,
            "mean * sqrt(d + 1)": weight.mean() * roots,
            "bias": bias,
            "output less that of a linear function": output - linear.view(output.shape),
        }

    expected = {
        "share of weights that are 0": 0.0,
        "spread * sqrt(d + 1)": 1.0,
        "mean * sqrt(d + 1)": 0.0,
        "bias": torch.zeros(heads),
        "output less that of a linear function": torch.zeros(2, 3),
    }
    spread = "spread * sqrt(d + 1)"
    mistakes = [
        (
            "the weights are zeros, as in the value head",
            {"share of weights that are 0": 1.0},
        ),
        (
            "nn.Linear's own initial weights are kept",
            {spread: roots / math.sqrt(3 * d)},
        ),
        ("the spread is 1 / (d + 1), without the root", {spread: 1 / roots}),
        ("the spread is GPT-2's 0.02", {spread: 0.02 * roots}),
        ("the output goes through a sigmoid", {spread: 0.25, "bias": [0.5] * heads}),
    ]
    error = 1 / math.sqrt(heads * d)  # the standard error of a mean of N(0, 1)
    bounds = {spread: 5 * error / math.sqrt(2), "mean * sqrt(d + 1)": 5 * error}
    return compare(_name(cls), call, expected, mistakes, bounds)
