"""The functions of the loop, taken from notebook 3, and the optimiser under them."""

import contextlib
import copy
import dataclasses
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from tests import small
from tests.small import EOS, PROMPTS, SETTINGS, collect, guarded, small_lm, update
from utils.models import PolicyWithValueHead, freeze
from utils.ppo import compute_gae, policy_loss, value_loss
from utils.rollout import has_ended
from utils.settings import FULL
from utils.training import get_device, trunk_dtype

NAN, INF = float("nan"), float("inf")
close, change = partial(torch.testing.assert_close, rtol=0), dataclasses.replace


@pytest.fixture
def policy():
    return small.make_policy()


def weights_of(model):
    return copy.deepcopy(model.state_dict())


def same(some, others):
    return all(torch.equal(weight, others[name]) for name, weight in some.items())


def test_a_rollout_adds_up(loop, policy):
    """All that is known of each response, as if it were alone, without any padding."""
    settings = change(SETTINGS, gae_lambda=0.5, temperature=2.0)
    reference = freeze(small_lm(seed=1))
    rollout = collect(loop, policy, reference, settings)
    for b, n in enumerate(rollout.mask.sum(1).tolist()):
        text = rollout.input_ids[b][rollout.attention_mask[b].bool()]
        for lm, name in ((policy.lm, "old_logprobs"), (reference, "ref_logprobs")):
            logits = lm(text[None]).logits[0, -n - 1 : -1].detach() / 2.0
            expected = logits.log_softmax(-1)[range(n), text[-n:]]
            close(getattr(rollout, name)[b, :n], expected, atol=1e-9)
    kl, mask = rollout.old_logprobs - rollout.ref_logprobs, rollout.mask.bool()
    assert kl.sum(1).abs().min() > 1e-3  # policy and reference do differ
    # all rewards of a response: its score, minus 0.1 a nat of KL
    close(rollout.rewards.sum(1), rollout.scores - 0.1 * kl.sum(1), atol=1e-9)
    assert not rollout.rewards[~mask].any()
    ended = has_ended(rollout.input_ids, rollout.mask, EOS)
    assert 0 < ended.sum() < len(rollout) and (rollout.scores[~ended] == -1).all()
    # the returns are formed before the advantages are whitened
    raw, returns = compute_gae(rollout.rewards, rollout.old_values, mask, 1.0, 0.5)
    close(rollout.returns, returns, atol=1e-9)
    white = (raw[mask] - raw[mask].mean()) / raw[mask].std(correction=0)
    close(rollout.advantages[mask], white, atol=1e-6)
    stats = update(loop, policy, rollout, settings)
    assert (stats["ratio_max"][0] - 1).abs() <= 1e-9
    # the figures that are shown, from the tokens
    found = loop["summarise"](rollout, stats, small_run(loop)[0], EOS)
    rows = zip(rollout.input_ids, rollout.mask, strict=True)
    texts = [tuple(ids[-len(m) :][m.bool()].tolist()) for ids, m in rows]
    n, length, old = len(texts), sum(map(len, texts)), rollout.old_logprobs
    known = {"kl": kl.sum().item() / n, "score": rollout.scores.mean().item()}
    known |= {"entropy": -old.sum().item() / length, "different": len(set(texts)) / n}
    known |= {"eos_rate": sum(text[-1] == EOS for text in texts) / n}
    known |= {"empty": texts.count((EOS,)) / n, "length": length / n}
    assert 0 < known["empty"] < known["eos_rate"]
    assert {k: found[k] for k in known} == pytest.approx(known, rel=1e-6)


@pytest.mark.parametrize("scaling, far", [(False, 0), (True, 0), (False, 3)])
def test_an_update_is_what_it_would_be_by_hand(loop, policy, scaling, far):
    """Two steps of plain gradient descent, with a setting of its own for each part.

    Loss scaling must not change them: the gradient is unscaled before its norm is
    clipped. Nor must any distance from the policy that wrote the rollout, in nats.
    """
    own = {"clip_range": 0.05, "value_clip_range": 0.01, "value_coef": 7.0}
    own |= {"ppo_epochs": 1, "max_approx_kl": 0.0}  # a policy far away is followed, too
    settings, rollout = change(SETTINGS, **own), collect(loop, policy)
    with torch.no_grad():  # so that ratios and values differ from the old ones
        for weight in policy.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=torch.manual_seed(1))
        rollout.old_logprobs -= far
    by_hand = copy.deepcopy(policy)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaling)
    sgd = torch.optim.SGD(policy.parameters(), lr=0.1)
    optimizer = guarded(policy, sgd, settings, scaler)
    half = change(settings, precision="float16")
    assert guarded(policy, settings=half).scaler.is_enabled()
    optimizer.resume()
    optimizer.backward(policy.value_head.bias.sum())  # a step that was interrupted
    scaler.unscale_(sgd)
    optimizer.resume()
    stats = update(loop, policy, rollout, settings, optimizer)
    assert 0 < stats["clip_fraction"][0] < 1
    assert (stats["ratio_mean"][0] > 10) == bool(far)
    assert far or 0 < stats["value_clip_fraction"][0] < 1

    order = torch.randperm(24, generator=torch.Generator().manual_seed(0)).tolist()
    for rows in (order[:12], order[12:]):
        batch = rollout.rows(torch.tensor(rows))
        logprobs, values = loop["evaluate_responses"](by_hand, *batch.texts)
        ratios = logprobs, batch.old_logprobs, batch.advantages, batch.mask
        errors = values, batch.old_values, batch.returns, batch.mask
        losses = policy_loss(*ratios, 0.05)[0], value_loss(*errors, 0.01)[0]
        by_hand.zero_grad()
        (losses[0] + 7.0 * losses[1]).backward()
        norm = sum((p.grad**2).sum() for p in by_hand.parameters()).sqrt()
        assert norm > 1  # it is clipped
        with torch.no_grad():
            for weight in by_hand.parameters():
                weight -= 0.1 * weight.grad / norm
    close(policy.state_dict(), by_hand.state_dict(), atol=1e-6)
    assert scaler.get_scale() == (1024.0 if scaling else 1.0)


def watched(loop, at, breaks=lambda x, part: x):
    """The loss of the notebook, which keeps the weights and numbers that it was given.

    What `breaks` makes of them takes the place of the value loss and of the whole.
    """

    def loss(policy, batch, settings):
        at.append((weights_of(policy), batch.raw_scores.tolist()))
        total, figures = loop["ppo_loss"](policy, batch, settings)
        figures["value_loss"] = breaks(figures["value_loss"], "loss")
        return breaks(total, "loss"), figures

    return loss


BREAKS = [
    ("gradient", NAN, 0, "norm of the gradients is nan"),
    ("gradient", INF, 0.5, "norm of the gradients is"),  # it was scaled down
    ("gradient", NAN, 1024.0, None),  # the scaler leaves this step out
    ("loss", INF, 1024.0, "value loss is inf"),
]


@pytest.mark.parametrize("what, factor, scale, says", BREAKS)
def test_a_number_that_breaks_moves_nothing(loop, what, factor, scale, says):
    """At the third of eight steps: what the second one made is kept."""
    policy, at = PolicyWithValueHead(small_lm()).float().eval(), []

    def breaks(x, part):
        return x * factor if (part, len(at)) == (what, 3) else x

    policy.value_head.weight.register_hook(lambda grad: breaks(grad, "gradient"))
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1, enabled=scale > 0)
    adam = torch.optim.AdamW(policy.parameters(), fused=True)  # as in the notebook
    how = (SETTINGS, guarded(policy, adam, scaler=scaler), watched(loop, at, breaks))
    sentence = f"^the {says}[^\n]* not taken[^\n]*$"
    stops = pytest.raises(FloatingPointError, match=sentence)
    with stops if says else contextlib.nullcontext():
        update(loop, policy, collect(loop, policy), *how)
    after = policy.state_dict() if says else at[3][0]
    assert same(after, at[2][0]) and not same(at[2][0], at[1][0])
    assert len(at) == 3 if says else scaler.get_scale() == 512.0


def test_an_update_ends_early_beyond_the_bound(loop, policy):
    """The step that would follow a KL above the bound is not taken, nor any other."""
    rollout, at = collect(loop, policy), []
    rollout = change(rollout, raw_scores=torch.arange(24.0))  # to tell them apart

    def go(bound):
        trained = copy.deepcopy(policy)
        optimizer = guarded(trained, torch.optim.AdamW(trained.parameters(), lr=0.05))
        settings = change(SETTINGS, max_approx_kl=bound)
        how = (settings, optimizer, watched(loop, at))
        return update(loop, trained, rollout, *how), trained.state_dict()

    free, _ = go(bound=0.0)
    kls = free["approx_kl"]  # of the minibatches
    assert free["optimizer_steps"] == len(kls) == 8 and kls[0] < 1e-9 < kls[1]
    # each response is used once an epoch, in another order
    epochs = [at[i][1] + at[i + 1][1] for i in range(0, 8, 2)]
    assert [sorted(epoch) for epoch in epochs] == 4 * [list(range(24))]
    assert len(set(map(tuple, epochs))) == 4
    first = 1 + int(kls[1:].argmax())
    stats, bounded = go((kls[:first].max() + kls[first]).item() / 2)
    assert stats["optimizer_steps"] == first > 1 and same(bounded, at[first][0])
    assert len(stats["approx_kl"]) == first + 1  # what ended it is in the records


def test_the_trunk_may_be_in_half_precision(loop):
    """Logits and everything after them are in float32: the first ratio is 1."""
    settings = change(SETTINGS, precision="bfloat16")
    policy = PolicyWithValueHead(small_lm()).float().eval()
    reference = freeze(copy.deepcopy(policy.lm))
    rollout, before = collect(loop, policy, reference, settings), weights_of(reference)
    assert rollout.old_logprobs.dtype == rollout.old_values.dtype == torch.float32
    with torch.no_grad():
        exact, _ = loop["evaluate_responses"](policy, *rollout.texts)
    assert (exact - rollout.old_logprobs).abs().max() > 1e-4
    stats = update(loop, policy, rollout, settings)
    ratios = (stats["ratio_max"] - 1).abs()
    assert ratios[0] <= 1e-2 and stats["approx_kl"][0] <= 1e-4 and ratios[-1] > 1e-3
    # The policy has changed, and nothing else; dropout stays off
    assert same(reference.state_dict(), before) and not policy.training
    assert not same(policy.lm.state_dict(), before) and policy.value_head.weight.any()


def test_micro_batches_make_the_same_rollout_and_step(loop, policy):
    """Although responses differ in length: each piece weighs by its tokens."""
    settings = change(SETTINGS, ppo_epochs=2, ppo_minibatch_size=24)
    found, start = [], weights_of(policy)
    for size in (24, 4):
        micro = change(settings, ppo_micro_batch_size=size)
        rollout, trained = collect(loop, policy, settings=micro), copy.deepcopy(policy)
        stats = update(loop, trained, rollout, micro)
        found.append((vars(rollout), trained.state_dict(), stats))
    assert len(set(rollout.mask.sum(1).tolist())) > 2 and not same(found[0][1], start)
    for whole, pieces in zip(*found, strict=True):
        close(whole, pieces, atol=1e-7)


def small_run(loop, **changes):
    """A run of PPO for a small model, its settings, and what `train` wants besides."""
    settings = {"ppo_episodes": 600, "ppo_lr": 3e-3, **changes}
    settings, lm = change(SETTINGS, **settings), small_lm()
    models = (freeze(copy.deepcopy(lm)), small.score, lambda step: PROMPTS * 8, EOS)
    return loop["fresh_run"](lm, settings), models, settings


def test_rates_rise_and_fall_and_an_adaptive_beta_steers_the_kl(loop):
    """By hand: beta grows by what the KL of each rollout was above its target."""
    changes = {"kl_target": 0.3, "ppo_episodes": 24 * 6}
    changes |= {"ppo_warmup": 2, "ppo_lr": 0.01}
    run, models, settings = small_run(loop, **changes)
    _, head = run.decay.get_last_lr()
    assert head == pytest.approx(settings.value_head_lr / 3)
    small.go(loop, run, models, settings)
    thirds = [1 / 3 * 6 / 6, 2 / 3 * 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    rates = [row["learning_rate"] for row in run.history]
    assert rates == pytest.approx([0.01 * x for x in thirds])
    assert run.decay.get_last_lr() == [0, 0]
    betas = [settings.kl_coef]
    for row in run.history:
        error = min(max(row["kl"] / 0.3 - 1, -0.2), 0.2)
        betas.append(betas[-1] * (1 + error * 24 / 10_000))
    used = [row["kl_coef"] for row in run.history]
    assert [*used, run.kl_coef] == pytest.approx(betas, rel=1e-9)
    assert len(set(used)) == 6


BEST = [("", "cpu float32"), ("mps", "cpu float32")]  # a Mac's GPU only if it is named
BEST += [(7, "cuda float16"), (8, "cuda bfloat16")]  # 7 is a T4, which emulates it


@pytest.mark.parametrize("gpu, best", BEST)
def test_device_and_precision_are_the_best_there_are_or_named(monkeypatch, gpu, best):
    cuda, here = gpu in (7, 8), SimpleNamespace(major=gpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: here)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: gpu == "mps")
    device = get_device(FULL)
    assert f"{device} {str(trunk_dtype(FULL, device))[6:]}" == best
    assert trunk_dtype(change(FULL, precision="float16"), device) == torch.float16
    for name, there in {"cuda": cuda, "mps": gpu == "mps", "cpu": True}.items():
        says = f"^[^\n]*'{name}'[^\n]* set [^\n]*auto"
        missing = pytest.raises(ValueError, match=says)
        with contextlib.nullcontext() if there else missing:
            assert get_device(change(FULL, device=name)).type == name
