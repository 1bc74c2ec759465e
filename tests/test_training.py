"""Numbers that are not finite stop a step; a full GPU says what to lower."""

import copy
import dataclasses
from types import SimpleNamespace

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

from tests.mac import on_a_mac
from tests.test_loop import CELLS, collect, guarded
from tests.test_loop import SETTINGS as LOOP_SETTINGS
from tests.test_rollout import small_lm
from utils.models import PolicyWithValueHead, freeze
from utils.settings import FULL, TINY
from utils.support.notebook import ROOT, import_cells
from utils.training import (
    accumulate_gradients,
    clip_gradients,
    default_preset,
    get_device,
    trunk_dtype,
)

pytestmark = pytest.mark.faults
NAN, INF = float("nan"), float("inf")
SCALER = torch.amp.GradScaler("cpu", enabled=False)


def model_with_gradients(*gradients):
    """A model of scalars, whose gradients these are."""
    model = torch.nn.ParameterDict(
        {f"w{i}": torch.nn.Parameter(torch.ones(2)) for i in range(len(gradients))}
    )
    for weight, gradient in zip(model.values(), gradients, strict=True):
        weight.grad = torch.tensor(gradient)
    return model


@pytest.mark.parametrize("max_norm", [1.0, 100.0])
def test_finite_gradients_are_clipped_as_by_torch(max_norm):
    gradients = [[3.0, 0.0], [0.0, 4.0]]  # of norm 5
    ours, torchs = model_with_gradients(*gradients), model_with_gradients(*gradients)
    clip_gradients(ours, max_norm, SCALER, {"loss": torch.tensor(2.0)})
    torch.nn.utils.clip_grad_norm_(torchs.parameters(), max_norm)
    for a, b in zip(ours.values(), torchs.values(), strict=True):
        assert torch.equal(a.grad, b.grad)
    assert ours["w0"].grad[0].item() == pytest.approx(3 * min(max_norm, 5) / 5, 1e-5)


@pytest.mark.parametrize(
    "stats, gradients, says",
    [
        ({"loss": NAN}, [[1.0, 1.0]], "^the loss is nan, so this step was not taken"),
        ({"loss": 1.0, "value_loss": INF}, [[1.0, 1.0]], "^the value loss is inf"),
        ({"loss": 1.0}, [[1.0, 1.0], [NAN, 1.0]], "^the gradient of w1 is nan"),
        (
            {"loss": 1.0},
            [[1.0, -INF], [1.0, 1.0], [NAN, 1.0]],
            r"^the gradient of w0 \(and of 1 other weights\) is -inf",
        ),
        # so large that only their common norm is too large for a float32
        ({"loss": 1.0}, [[3e38, 3e38]], "^the gradient of all weights"),
    ],
)  # fmt: skip
def test_what_is_not_finite_is_named_before_it_is_used(
    survived, stats, gradients, says
):
    model = model_with_gradients(*gradients)
    figures = {k: torch.tensor(v) for k, v in stats.items()}
    with pytest.raises(FloatingPointError, match=says) as caught:
        clip_gradients(model, 1.0, SCALER, figures)
    assert "\n" not in str(caught.value) and "lower the learning rate" in str(
        caught.value
    )
    survived("a loss or gradient that is not finite", str(caught.value))
    for weight, gradient in zip(model.values(), gradients, strict=True):
        torch.testing.assert_close(weight.grad, torch.tensor(gradient), equal_nan=True)


@pytest.mark.parametrize(
    "scale, figure, stops",
    [(8.0, 1.0, False), (0.5, 1.0, True), (8.0, NAN, True)],
)
def test_with_loss_scaling_an_overflow_is_left_to_the_scaler(scale, figure, stops):
    """But not a loss, nor a gradient that overflows without being scaled up."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(torch.zeros(()))  # the scale is made with the first loss
    stats = {"loss": torch.tensor(figure)}
    if not stops:
        clip_gradients(model_with_gradients([INF, 1.0]), 1.0, scaler, stats)
        # which sees no gradient overflow here, though their norm does
        with pytest.raises(FloatingPointError, match="all weights together is inf"):
            clip_gradients(model_with_gradients([3e38, 3e38]), 1.0, scaler, stats)
        return
    with pytest.raises(FloatingPointError):
        clip_gradients(model_with_gradients([INF, 1.0]), 1.0, scaler, stats)


def half_a_step(optimizer, loss):
    optimizer.zero_grad()
    optimizer.backward(loss)
    optimizer.scaler.unscale_(optimizer.optimizer)


def scalar_model():
    """A weight of two numbers, and its optimiser with loss scaling by 16."""
    model = torch.nn.ParameterDict({"w": torch.nn.Parameter(torch.ones(2))})
    sgd = torch.optim.SGD(model.parameters(), lr=0.5)
    return model, guarded(model, sgd, scaler=torch.amp.GradScaler("cpu", 16.0))


def test_a_half_step_is_forgotten():
    """An interrupted step, in float16: the next one is taken, at the same scale."""
    model, optimizer = scalar_model()
    optimizer.resume()  # before there was any
    half_a_step(optimizer, model["w"].sum() / 4)
    with pytest.raises(RuntimeError, match="already been called"):
        half_a_step(optimizer, model["w"].sum() / 4)
    optimizer.resume()
    optimizer.zero_grad()
    optimizer.backward(model["w"].sum() / 4)
    optimizer.step(loss=torch.tensor(0.5))
    assert model["w"].tolist() == [0.875, 0.875]
    assert optimizer.scaler.get_scale() == 16.0
    _, plain = scalar_model()
    plain.scaler = SCALER
    plain.resume()  # one that does nothing


def test_the_state_of_an_optimiser_comes_back():
    """Two steps, or one and its state in another: the same, with momentum and scale."""
    found = []
    for handed_over in (False, True):
        model, optimizer = scalar_model()
        optimizer.optimizer = torch.optim.Adam(model.parameters(), lr=0.5)
        for step in range(2):
            if step and handed_over:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = guarded(
                    model,
                    torch.optim.Adam(model.parameters(), lr=0.1),
                    scaler=torch.amp.GradScaler("cpu", 2.0),
                )
                optimizer.load_state_dict(state)
                assert optimizer.scaler.get_scale() == 16.0
            optimizer.zero_grad()
            optimizer.backward((model["w"] * torch.tensor([1.0, 3.0 + step])).sum())
            optimizer.step(loss=torch.tensor(0.0))
        found.append(model["w"].detach())
    assert torch.equal(*found) and (found[0] - 1).abs().min() > 0.5


class Numbers:
    """A batch of numbers, each with a number of tokens."""

    def __init__(self, numbers, tokens):
        self.numbers, self.tokens = torch.tensor(numbers), torch.tensor(tokens)

    def __len__(self):
        return len(self.numbers)

    @property
    def n_tokens(self):
        return self.tokens.sum()

    def pieces(self, size):
        for i in range(0, len(self.numbers), size):
            part = slice(i, i + size)
            yield Numbers(self.numbers[part].tolist(), self.tokens[part].tolist())


@pytest.mark.parametrize("size", [4, 2, 1])
def test_gradients_in_pieces_by_hand(size):
    """The mean over tokens; the largest of what is called so."""
    model, optimizer = scalar_model()
    batch = Numbers([1.0, 2.0, 3.0, 4.0], [1, 2, 3, 4])

    def loss(model, batch, settings):
        mean = (batch.numbers * batch.tokens).sum() / batch.n_tokens
        figures = {"mean": mean, "number_max": batch.numbers.max()}
        return mean * model["w"].sum(), figures

    settings = dataclasses.replace(
        LOOP_SETTINGS, ppo_minibatch_size=4, ppo_micro_batch_size=size
    )
    figures = accumulate_gradients(loss, model, batch, optimizer, settings)
    assert figures["mean"].item() == pytest.approx(3.0)  # (1 + 4 + 9 + 16) / 10
    assert figures["number_max"].item() == 4.0
    assert (model["w"].grad / 16).tolist() == pytest.approx([3.0, 3.0])


@pytest.mark.parametrize("gpu, preset", [(True, "full"), (False, "tiny")])
def test_the_preset_is_what_the_machine_can_do(monkeypatch, capsys, gpu, preset):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert default_preset() == preset
    said = capsys.readouterr().out
    assert (said == "") == gpu
    assert gpu or "T4 GPU" in said and 'PRESET = "full" in the first cell' in said


def test_without_a_gpu_full_warns_and_goes_on(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.warns(UserWarning, match="the preset 'tiny' runs in minutes"):
        assert get_device(FULL).type == "cpu"


def a_machine_with(monkeypatch, cuda=False, mps=False):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    "wanted, there, found",
    [
        ("auto", {}, "cpu"),
        ("auto", {"cuda": True}, "cuda"),
        ("auto", {"mps": True}, "cpu"),  # a Mac's GPU has to be asked for
        ("cpu", {"cuda": True, "mps": True}, "cpu"),
        ("cuda", {"cuda": True}, "cuda"),
        ("mps", {"mps": True}, "mps"),
    ],
)
def test_the_device_is_the_one_that_is_named(monkeypatch, wanted, there, found):
    a_machine_with(monkeypatch, **there)
    settings = dataclasses.replace(TINY, device=wanted)
    assert get_device(settings) == torch.device(found)
    assert trunk_dtype(settings, torch.device("mps")) == torch.float32


@pytest.mark.faults
@pytest.mark.parametrize("wanted", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_named(monkeypatch, survived, wanted):
    a_machine_with(monkeypatch)
    says = f"^device is '{wanted}', and PyTorch finds none here; set it to"
    with pytest.raises(ValueError, match=says) as e:
        get_device(dataclasses.replace(TINY, device=wanted))
    assert "\n" not in str(e.value)
    survived(f"RLHF_DEVICE={wanted} where there is none", str(e.value))


@pytest.mark.parametrize(
    "gpu, dtype",
    [
        ({"major": 7, "minor": 5}, torch.float16),  # a T4, which emulates bfloat16
        ({"major": 8, "minor": 0}, torch.bfloat16),
        ({"gcnArchName": "gfx1030", "major": 10}, torch.float16),  # RDNA2
        ({"gcnArchName": "gfx906:sramecc+:xnack-", "major": 9}, torch.float16),
        ({"gcnArchName": "gfx1100", "major": 11}, torch.bfloat16),  # RDNA3
        ({"gcnArchName": "gfx90a:sramecc+:xnack-", "major": 9}, torch.bfloat16),
        ({"gcnArchName": "gfx942", "major": 9}, torch.bfloat16),
    ],
)
def test_precision_follows_the_gpu(monkeypatch, gpu, dtype):
    """Of AMD's, what NVIDIA calls the compute capability says nothing."""
    hip = "6.4" if "gcnArchName" in gpu else None
    monkeypatch.setattr(torch.version, "hip", hip)
    a_machine_with(monkeypatch, cuda=True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    properties = SimpleNamespace(**gpu)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: (gpu["major"], 0)
    )
    device = torch.device("cuda")
    assert trunk_dtype(FULL, device) == dtype
    assert trunk_dtype(FULL, torch.device("cpu")) == torch.float32
    forced = dataclasses.replace(FULL, precision="float32")
    assert trunk_dtype(forced, device) == torch.float32


def test_the_imitated_mac_has_no_float64():
    x = on_a_mac(torch.ones(3))
    assert x.device.type == "mps" and (x + 1).device.type == "mps"
    for make in (
        lambda: x.double(),
        lambda: x.to(torch.float64),
        lambda: x.cumsum(0, dtype=torch.float64),
    ):
        with pytest.raises(TypeError, match="float64"):
            make()
    assert x.cpu().double().sum() == 3 and x.to("cpu").device.type == "cpu"


def test_gradients_are_clipped_on_a_mac(monkeypatch):
    """To the same bound, with the same look at what is not finite."""
    norm = torch.nn.utils.get_total_norm
    monkeypatch.setattr(
        torch.nn.utils, "get_total_norm", lambda grads: on_a_mac(norm(grads))
    )
    model = model_with_gradients([3.0, 0.0], [0.0, 4.0])
    clip_gradients(model, 1.0, SCALER, {"loss": on_a_mac(torch.tensor(2.0))})
    assert model["w0"].grad.tolist() == pytest.approx([0.6, 0.0], rel=1e-5)
    assert model["w1"].grad.tolist() == pytest.approx([0.0, 0.8], rel=1e-5)
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        clip_gradients(model, 1.0, SCALER, {"loss": on_a_mac(torch.tensor(NAN))})


@pytest.fixture
def started():
    """The two functions of the loop, a policy, its optimiser, and a first rollout."""
    loop = import_cells("3-RLHF.ipynb", *CELLS)
    policy = PolicyWithValueHead(small_lm()).double().eval()
    rollout = collect(loop, policy, freeze(small_lm(seed=1)))
    return loop["ppo_update"], policy, rollout


SETTINGS = dataclasses.replace(LOOP_SETTINGS, ppo_episodes=24, ppo_micro_batch_size=4)


def update(started, settings, lr=1e-3, optimizer=None):
    ppo_update, policy, rollout = started
    adam = torch.optim.AdamW(policy.parameters(), lr=lr)
    optimizer = optimizer or guarded(policy, adam, settings)
    generator = torch.Generator().manual_seed(0)
    return ppo_update(policy, optimizer, rollout, settings, generator)


def test_ppo_keeps_the_last_good_weights(started):
    """A gradient that breaks at the third step leaves what the second one made."""
    _, policy, _ = started
    good, calls = [], []
    weight = policy.value_head.weight

    def hook(grad):
        calls.append(1)
        if len(calls) % 3 == 1:  # the first of the three pieces of a minibatch
            good.append(copy.deepcopy(policy.state_dict()))
        return grad * NAN if len(calls) == 8 else grad

    weight.register_hook(hook)
    with pytest.raises(
        FloatingPointError, match="gradient of value_head.weight is nan"
    ):
        update(started, SETTINGS)
    assert len(good) == 3
    assert not torch.equal(good[2]["value_head.weight"], good[1]["value_head.weight"])
    for name, weight in policy.state_dict().items():
        assert torch.equal(weight, good[2][name])


def test_a_loss_that_breaks_is_named(started):
    _, policy, rollout = started
    rollout.returns[3] = NAN
    before = copy.deepcopy(policy.state_dict())
    with pytest.raises(FloatingPointError, match="^the value loss is nan"):
        update(started, dataclasses.replace(SETTINGS, ppo_minibatch_size=24))
    for name, weight in policy.state_dict().items():
        assert torch.equal(weight, before[name])


def test_an_update_ends_early_beyond_the_bound(started, survived):
    """The step that would follow a KL above the bound is not taken, nor any other."""
    _, policy, _ = started
    free = dataclasses.replace(SETTINGS, max_approx_kl=0.0)
    trained = copy.deepcopy(policy)
    stats = update((started[0], trained, started[2]), free, lr=0.05)
    assert stats["optimizer_steps"].item() == 8
    kls = stats["approx_kl"]  # of the minibatches
    assert len(kls) == 8 and kls[0] < 1e-9 < kls[1]
    # A bound that the second or a later one is the first to exceed
    bound = next(
        bound
        for bound in torch.linspace(1e-3, kls.max().item(), 200).tolist()
        if (kls > bound).int().argmax() > 1
    )
    first = int((kls > bound).int().argmax())
    bounded = copy.deepcopy(policy)
    settings = dataclasses.replace(SETTINGS, max_approx_kl=bound)
    stats = update((started[0], bounded, started[2]), settings, lr=0.05)
    assert stats["optimizer_steps"].item() == first
    said = f"the update ends after {first} of 8 steps, and the record says so"
    survived(f"approx_kl above max_approx_kl ({bound:.2g})", said)
    assert len(stats["approx_kl"]) == first + 1  # what ended it is in the records
    # The same first steps by hand
    by_hand = copy.deepcopy(policy)
    optimizer = guarded(by_hand, torch.optim.AdamW(by_hand.parameters(), lr=0.05), free)
    steps, step = [], optimizer.step

    class Stop(Exception):
        pass

    def counted(**figures):
        if len(steps) == first:
            raise Stop
        steps.append(1)
        step(**figures)

    optimizer.step = counted
    with pytest.raises(Stop):
        update((started[0], by_hand, started[2]), free, optimizer=optimizer)
    for a, b in zip(bounded.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "name, who",
    [
        ("scores", "reward model"),
        ("old_logprobs", "policy"),
        ("ref_logprobs", "reference"),
        ("old_values", "value head of the policy"),
        ("advantages", "function that makes the advantages"),
    ],
)
def test_a_rollout_with_a_number_that_is_not_finite(started, survived, name, who):
    rollout = started[2]
    broken = getattr(rollout, name).clone()
    broken.view(-1)[2] = NAN
    says = f"^one of the {name} is nan; check the {who} "
    with pytest.raises(ValueError, match=says) as caught:
        dataclasses.replace(rollout, **{name: broken})
    survived(f"a rollout in which one of the {name} is nan", str(caught.value))


OUT_OF_MEMORY = """
import torch, weakref
class Big: pass
def fill():
    big = Big()
    global held
    held = weakref.ref(big)
    raise torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB.\\nGPU 0")
kept = "still here"
fill()
"""


def test_a_full_gpu_says_what_to_lower_and_can_be_used_again(survived):
    """In a real kernel; the error is raised by hand, since no GPU is needed here."""
    cells = [
        "from utils.settings import TINY\n"
        "from utils.support.notebook import how_to_save_memory\n"
        "from utils.support.notebook import say_errors_in_a_sentence\n"
        "say_errors_in_a_sentence(how_to_save_memory(TINY, 'policy'))",
        OUT_OF_MEMORY,
        "print(kept, held() is None)",
        "1 / 0",
        "from utils.settings import load_settings; load_settings('tyni')",
        "raise KeyboardInterrupt",
        "from utils.data import pad; pad([None], 0)",
        "import torch\nfrom utils.ppo import masked_mean\n"
        "masked_mean(torch.ones(2), torch.ones(3))",
    ]
    notebook = new_notebook(cells=[new_code_cell(cell) for cell in cells])
    client = NotebookClient(
        notebook,
        timeout=None,
        allow_errors=True,
        resources={"metadata": {"path": str(ROOT)}},
    )
    client.execute()
    outputs = [cell.outputs for cell in notebook.cells]
    (error,) = outputs[1]
    assert error.ename == "OutOfMemoryError"
    assert error.evalue.startswith(
        "the GPU's memory is full; lower ppo_micro_batch_size (64) or "
        "ppo_minibatch_size (64) or ppo_rollout_size (256) or max_new_tokens (32) (in"
    )
    assert len(error.traceback) == 1 and "fill()" not in error.traceback[0]
    assert outputs[2][0].text == "still here True\n"
    assert outputs[3][0].ename == "ZeroDivisionError"  # other errors are as ever
    assert len(outputs[3][0].traceback) > 1
    survived("the GPU's memory is full", error.evalue)
    # What is meant for people is one sentence, an accident inside `utils` is not
    assert outputs[4][0].traceback == [
        "ValueError: there is no preset 'tyni'; the nearest is 'tiny'"
    ]
    assert outputs[5][0].traceback == ["KeyboardInterrupt: run the cell again"]
    assert outputs[6][0].ename == "TypeError" and len(outputs[6][0].traceback) > 1
    # Who calls a formula wrongly sees where
    assert outputs[7][0].ename == "ValueError" and len(outputs[7][0].traceback) > 1
    nbformat.validate(notebook)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_what_a_gpu_really_raises_is_caught():
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(2**60, device="cuda")
