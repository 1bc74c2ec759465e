"""Every function of utils/fast.py against the plain version that it equals."""

import math

import pytest
import torch

from tests.mac import on_a_mac
from tests.test_models import ROWS, gpt2, llama
from utils import fast, ppo
from utils.data import pad
from utils.models import hidden_states, position_ids

EXACT = {"atol": 1e-12, "rtol": 0}


def t(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def linear_case(seed=0, n=7, d=4, words=9):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator, dtype=torch.float64)
    weight = torch.randn(words, d, generator=generator, dtype=torch.float64)
    labels = torch.randint(words, (n,), generator=generator)
    labels[1] = labels[0]  # two gradients for the same row of the weight
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def test_linear_logprobs_by_hand():
    hidden, weight = t([1.0, 2.0]), t([1.0, 0.0], [0.0, 1.0], [0.0, 0.0])
    by_hand = 2 - math.log(math.exp(1) + math.exp(2) + 1)
    got = fast.linear_logprobs(hidden, weight, torch.tensor([1]))
    torch.testing.assert_close(got, t(by_hand), **EXACT)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_linear_logprobs_is_token_logprobs_of_the_logits(temperature):
    """Values and both gradients, against automatic differentiation."""
    hidden, weight, labels = linear_case()
    upstream = torch.randn(len(labels), dtype=torch.float64)
    found = []
    for logprobs in (
        fast.linear_logprobs(hidden, weight, labels, temperature),
        ppo.token_logprobs(hidden @ weight.t(), labels, temperature),
    ):
        gradients = torch.autograd.grad((logprobs * upstream).sum(), (hidden, weight))
        found.append((logprobs, *gradients))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_linear_logprobs_has_the_gradient_of_finite_differences():
    hidden, weight, labels = linear_case()
    assert torch.autograd.gradcheck(
        lambda h, w: fast.linear_logprobs(h, w, labels), (hidden, weight)
    )


def test_linear_logprobs_near_gpt2s_logits_and_from_half_precision():
    """An offset of -100 costs a few times the rounding of float32 there, 8e-6."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 4, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(50, 4, generator=generator)
    labels = torch.randint(50, (6,), generator=generator)
    exact = ppo.token_logprobs(hidden.double() @ weight.double().t(), labels)
    ones = torch.cat([hidden, torch.full((6, 1), -100.0)], dim=1)
    shifted = torch.cat([weight, torch.ones(50, 1)], dim=1)
    got = fast.linear_logprobs(ones, shifted, labels)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, atol=3e-5, rtol=0)
    got.sum().backward()
    assert hidden.grad.dtype == torch.bfloat16 and hidden.grad.abs().sum() > 0
    half = fast.linear_logprobs(hidden, weight.bfloat16(), labels)
    assert half.dtype == torch.float32


def test_linear_logprobs_keeps_one_tensor_of_the_size_of_the_logits():
    hidden, weight, labels = linear_case(n=30, d=2, words=1000)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: sizes.append(x.numel()) or x, lambda x: x
    ):
        fast.linear_logprobs(hidden, weight, labels)
    assert sum(size >= 30 * 1000 for size in sizes) == 1


def test_linear_logprobs_names_bad_arguments():
    hidden, weight, labels = linear_case(n=7, d=4)
    with pytest.raises(ValueError, match=r"hidden without d \(7,\).*labels \(6,\)"):
        fast.linear_logprobs(hidden, weight, labels[:6])
    with pytest.raises(ValueError, match=r"hidden \(1, 4\).*weight \(1, 3\)"):
        fast.linear_logprobs(hidden, weight[:, :3], labels)
    for temperature in (0, -1.0):
        with pytest.raises(ValueError, match=f"temperature.*{temperature}"):
            fast.linear_logprobs(hidden, weight, labels, temperature)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_drawn_tokens_have_the_odds_of_the_softmax(temperature):
    """Four standard errors of 100,000 draws, for states that take turns."""
    states, weight, _ = (x.detach() for x in linear_case(n=3, words=6))
    n, generator = 100_000, torch.Generator().manual_seed(0)
    drawn = fast.draw_tokens(states.repeat(n, 1), weight, temperature, generator)
    for k, state in enumerate(states):
        p = (weight @ state / temperature).softmax(0)
        shares = drawn[k :: len(states)].bincount(minlength=6) / n
        assert ((shares - p).abs() <= 4 * (p * (1 - p) / n).sqrt()).all()


def test_tokens_are_drawn_at_temperature_1_unless_another_is_named():
    states, weight, _ = (x.detach() for x in linear_case(n=200))
    drawn = [
        fast.draw_tokens(
            states, weight, *given, generator=torch.Generator().manual_seed(0)
        )
        for given in ([], [1.0], [5.0])
    ]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_each_token_is_drawn_from_its_own_state():
    """More states than are looked at together; each leaves one word only."""
    words = torch.arange(3 * fast.DRAWS - 5) % 11
    states = torch.nn.functional.one_hot(words, 11).float()
    assert torch.equal(fast.draw_tokens(states, 1000 * torch.eye(11)), words)


@pytest.mark.parametrize("place, word", [(0.0, 1), (1 - 2**-53, 2)])
def test_a_word_without_probability_is_never_drawn(place, word, monkeypatch):
    """Not even by the smallest or the largest of the random numbers."""
    monkeypatch.setattr(
        torch, "rand", lambda shape, **how: torch.full(shape, place, dtype=how["dtype"])
    )
    weight = torch.tensor([[-2000.0], [0.0], [0.0], [-2000.0]])
    assert fast.draw_tokens(torch.ones(1, 1), weight).tolist() == [word]


def test_a_state_that_is_not_a_number_draws_a_word_there_is():
    """On a GPU a word that there is not would end the process."""
    hidden, weight = torch.full((2, 3), float("nan")), torch.randn(10, 3)
    assert fast.draw_tokens(hidden, weight).tolist() == [9, 9]


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_grouped_by_length_give_the_same_states(make, side, monkeypatch):
    """And the same gradients; each group is as wide as its longest text."""
    monkeypatch.setattr(fast, "GROUP", 2)
    trunk, rows = make().double().base_model, [*ROWS, [7, 7, 7]]
    ids, mask = pad(rows, pad_id=0, side=side)
    real, ends = mask.bool(), (mask * torch.arange(1, 6)).amax(dim=1)
    generator = torch.Generator().manual_seed(0)
    upstream = torch.randn(5, 5, 16, generator=generator, dtype=torch.float64)
    widths, found = [], []
    hook = trunk.register_forward_hook(
        lambda _, args, out: widths.append(out.last_hidden_state.shape[:2])
    )
    grouped = fast.hidden_states_by_length(trunk, ids, mask, position_ids(mask), ends)
    hook.remove()
    for states in (grouped, hidden_states(trunk, ids, mask)):
        trunk.zero_grad()
        (states * upstream)[real].sum().backward()
        gradients = [p.grad.clone() for p in trunk.parameters() if p.grad is not None]
        found.append([states[real], *gradients])
    assert len(found[0]) > 10
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)
    if side == "right":
        assert widths == [(2, 2), (2, 4), (1, 5)]
        for states, end in zip(grouped, (5, 2, 2, 4, 4), strict=True):
            assert states[end:].eq(0).all()


def test_a_place_on_a_mac_is_as_fine_as_float64s(monkeypatch):
    """Two draws of 24 bits make one of 48, between 0 and 1, spread evenly."""
    drawn, rand = [], torch.rand

    def record(*shape, **options):
        assert options.pop("dtype", torch.float32) == torch.float32  # all that it has
        assert options.pop("device").type == "mps"
        drawn.append(rand(*shape, **options))
        return drawn[-1]

    monkeypatch.setattr(torch, "rand", record)
    generator = torch.Generator().manual_seed(0)
    places = fast.random_places(4000, torch.device("mps"), generator)
    assert places.dtype == torch.float64 and places.shape == (4000, 1)
    assert places.min() >= 0 and places.max() < 1
    high, low = drawn[0].double()
    assert torch.equal(places, high + low / 2**24)
    assert (places.mean() - 0.5).abs() < 4 / math.sqrt(12 * 4000)


def test_places_elsewhere_are_what_they_always_were():
    """Else the seeded figures of every run would change."""
    seeded = (torch.Generator().manual_seed(3) for _ in range(2))
    ours = fast.random_places(5, torch.device("cpu"), next(seeded))
    theirs = torch.rand((5, 1), dtype=torch.float64, generator=next(seeded))
    assert torch.equal(ours, theirs)


def test_tokens_are_drawn_on_a_mac_as_on_a_cpu(monkeypatch):
    """The probabilities end to end on the CPU, which has float64; the same places."""
    hidden, weight = torch.randn(100, 4), torch.randn(9, 4)
    place = torch.linspace(0, 1, 101, dtype=torch.float64)[:-1, None]
    places = iter(place.split(fast.DRAWS))
    monkeypatch.setattr(fast, "random_places", lambda *_: next(places))
    expected = fast.draw_tokens(hidden, weight)
    places = iter(place.split(fast.DRAWS))
    softmax = torch.softmax
    monkeypatch.setattr(torch, "softmax", lambda *a, **k: on_a_mac(softmax(*a, **k)))
    assert torch.equal(fast.draw_tokens(hidden, weight), expected)


@pytest.mark.parametrize(
    "device, waits", [("cuda", False), ("mps", True), ("cpu", True)]
)
def test_only_cuda_is_sent_to_without_a_wait(device, waits):
    """A Mac's copies without a wait have been wrong in public reports."""
    calls = []

    class Sent:
        def to(self, device, non_blocking):
            calls.append((str(device), non_blocking))

    fast.send(Sent(), torch.device(device))
    assert calls == [(device, device == "cuda")]
