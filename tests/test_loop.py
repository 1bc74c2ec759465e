"""The functions of the loop, taken from notebook 3."""

import contextlib
import copy
import dataclasses
import inspect

import pytest
import torch

from tests.test_rollout import EOS, PROMPTS, small_lm
from utils.models import PolicyWithValueHead, freeze
from utils.ppo import compute_gae
from utils.rollout import Rollout, has_ended, normalise_scores
from utils.settings import TINY
from utils.support.notebook import LOOP, import_cells
from utils.training import GuardedOptimizer

CELLS = ("collect-rollout", "ppo-advantages", "ppo-loss", "ppo-update")
SETTINGS = dataclasses.replace(
    TINY,
    ppo_episodes=48,
    ppo_rollout_size=24,
    ppo_minibatch_size=12,
    ppo_micro_batch_size=12,
    max_new_tokens=6,
)


@pytest.fixture(scope="module")
def loop():
    return import_cells("3-RLHF.ipynb", *LOOP)


def make_policy():
    policy = PolicyWithValueHead(small_lm()).double().eval()
    torch.nn.init.normal_(policy.value_head.weight, std=0.1)
    return policy


@pytest.fixture
def policy():
    return make_policy()


def score(ids, attention, mask):
    """1 for each token 3 in the response, if it ended; raw and normalised."""
    raw = ((ids[:, -mask.shape[1] :] == 3) & mask.bool()).sum(1).double()
    return raw, normalise_scores(raw, has_ended(ids, mask, EOS), 0.0, 1.0, -1.0)


def collect(loop, policy, reference, seed=0, settings=SETTINGS, kl_coef=0.1, by=score):
    """A rollout with its advantages, scored by this function."""
    generator = torch.Generator().manual_seed(seed)
    rollout = loop["collect_rollout"](
        policy, reference, by, PROMPTS * 8, EOS, settings, generator
    )
    return loop["ppo_advantages"](rollout, settings, kl_coef)


def guarded(
    policy, optimizer=None, settings=SETTINGS, scaler=None, kind=GuardedOptimizer
):
    """The optimiser that the loop takes; AdamW if none is given."""
    optimizer = optimizer or torch.optim.AdamW(policy.parameters(), lr=1e-3, eps=1e-5)
    made = kind(policy, optimizer, settings, settings.max_grad_norm)
    made.scaler = scaler or made.scaler
    return made


def update(loop, policy, rollout, settings=SETTINGS, optimizer=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    optimizer = optimizer or guarded(policy, settings=settings)
    return loop["ppo_update"](policy, optimizer, rollout, settings, generator)


def test_a_rollout_adds_up(loop, policy):
    reference = freeze(small_lm(seed=1))
    rollout = collect(loop, policy, reference)
    mask = rollout.mask.bool()
    kl = (rollout.old_logprobs - rollout.ref_logprobs).sum(1)
    assert kl.abs().min() > 1e-3  # policy and reference do differ
    # all rewards of a response: its score, minus 0.1 a nat of KL
    total = rollout.rewards.sum(1)
    torch.testing.assert_close(total, rollout.scores - 0.1 * kl, atol=1e-9, rtol=0)
    assert not rollout.rewards[~mask].any()
    ended = has_ended(rollout.input_ids, rollout.mask, EOS)
    assert 0 < ended.sum() < len(rollout)
    assert (rollout.scores[~ended] == -1).all()


def test_one_ends_at_once_one_at_the_limit_and_one_never(policy):
    """Three responses side by side, each as if it were alone."""
    responses = torch.tensor([[EOS, EOS, EOS], [3, 3, EOS], [3, 4, 5]])
    mask = torch.tensor([[1, 0, 0], [1, 1, 1], [1, 1, 1]])
    prompts = [[5, 6], [3], [4, 2, 1]]
    reference = freeze(small_lm(seed=1))

    def collect_these(rows):
        def sampled(lm, prompt_ids, prompt_mask, *_):
            ids = torch.cat([prompt_ids, responses[rows]], dim=1)
            return ids, torch.cat([prompt_mask, mask[rows]], dim=1), mask[rows]

        own = import_cells("3-RLHF.ipynb", "collect-rollout", "ppo-advantages")
        own["sample_responses"] = sampled
        chosen = [prompts[b] for b in rows]
        rollout = own["collect_rollout"](
            policy, reference, score, chosen, EOS, SETTINGS, None
        )
        return own["ppo_advantages"](rollout, SETTINGS, 0.1)

    together = collect_these([0, 1, 2])
    assert together.scores.tolist() == [0.0, 2.0, -1.0]  # one never ends: -1
    for b in range(3):
        alone = collect_these([b])
        n = int(mask[b].sum())
        for name in (
            "old_logprobs",
            "ref_logprobs",
            "old_values",
            "rewards",
            "returns",
        ):
            a, rest = getattr(together, name)[b, :n], getattr(together, name)[b, n:]
            b_alone = getattr(alone, name)[0, :n]
            torch.testing.assert_close(a, b_alone, atol=1e-9, rtol=0)
            assert rest.eq(0).all()
    # all that is to come after an EOS that comes first is its own reward
    r = together.scores[0] - 0.1 * (together.old_logprobs - together.ref_logprobs)[0, 0]
    torch.testing.assert_close(together.returns[0, 0], r, atol=1e-9, rtol=0)


def test_the_returns_are_formed_before_the_advantages_are_whitened(loop, policy):
    settings = dataclasses.replace(SETTINGS, gamma=0.9, gae_lambda=0.5)
    rollout = collect(loop, policy, freeze(small_lm(seed=1)), settings=settings)
    mask = rollout.mask.bool()
    raw, returns = compute_gae(rollout.rewards, rollout.old_values, mask, 0.9, 0.5)
    torch.testing.assert_close(rollout.returns, returns, atol=1e-9, rtol=0)
    white = (raw[mask] - raw[mask].mean()) / raw[mask].std(correction=0)
    torch.testing.assert_close(rollout.advantages[mask], white, atol=1e-6, rtol=0)


def test_every_log_probability_is_at_the_temperature(loop, policy):
    hot = dataclasses.replace(SETTINGS, temperature=2.0)
    reference = freeze(small_lm(seed=1))
    rollout = collect(loop, policy, reference, settings=hot)
    for b in range(len(rollout)):
        text = rollout.input_ids[b][rollout.attention_mask[b].bool()]
        n = int(rollout.mask[b].sum())
        for lm, name in ((policy.lm, "old_logprobs"), (reference, "ref_logprobs")):
            logits = lm(text[None]).logits[0, -n - 1 : -1].detach() / 2.0
            expected = logits.log_softmax(-1)[range(n), text[-n:]]
            got = getattr(rollout, name)[b, :n]
            torch.testing.assert_close(got, expected, atol=1e-9, rtol=0)
    stats = update(loop, policy, rollout, hot)
    assert (stats["ratio_max"][0] - 1).abs() <= 1e-9


@pytest.mark.parametrize("scaling, far", [(False, 0), (True, 0), (False, 3)])
def test_an_update_is_what_it_would_be_by_hand(
    loop, policy, scaling, far, optimizer=GuardedOptimizer
):
    """Two steps of plain gradient descent, with a setting of its own for each part.

    Loss scaling, which float16 needs, must not change them: the gradient is unscaled
    before its norm is clipped. Nor is there a step that does not follow the loss,
    however many nats the policy is from the one that wrote the rollout.
    """
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaling)
    settings = dataclasses.replace(
        SETTINGS,
        ppo_epochs=1,
        clip_range=0.05,
        value_clip_range=0.01,
        value_coef=0.7,
        max_grad_norm=0.5,
        max_approx_kl=0.0,  # so that a policy far away is followed, too
    )
    rollout = collect(loop, policy, freeze(small_lm(seed=1)))
    with torch.no_grad():  # so that ratios and values differ from the old ones
        for weight in policy.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=torch.manual_seed(1))
        rollout.old_logprobs -= far
    by_hand = copy.deepcopy(policy)
    sgd = torch.optim.SGD(policy.parameters(), lr=0.1)
    optimizer = guarded(policy, sgd, settings, scaler, optimizer)
    stats = update(loop, policy, rollout, settings, optimizer)
    assert 0 < stats["clip_fraction"][0] < 1
    if far:
        assert stats["ratio_mean"][0] > 10
    else:
        assert 0 < stats["value_clip_fraction"][0] < 1

    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    for rows in (order[:12], order[12:]):
        losses = []
        for b in rows.tolist():
            text = rollout.input_ids[b][rollout.attention_mask[b].bool()]
            n = int(rollout.mask[b].sum())
            hidden = by_hand.lm.base_model(text[None]).last_hidden_state[0, -n - 1 : -1]
            logits = by_hand.lm(text[None]).logits[0, -n - 1 : -1]
            logprobs = logits.log_softmax(-1)[range(n), text[-n:]]
            for t in range(n):
                ratio = (logprobs[t] - rollout.old_logprobs[b, t]).exp()
                A, G = rollout.advantages[b, t], rollout.returns[b, t]
                V, old = by_hand.value_head(hidden[t]), rollout.old_values[b, t]
                gain = torch.minimum(A * ratio, A * ratio.clamp(0.95, 1.05))
                near = old + (V - old).clamp(-0.01, 0.01)
                error = torch.maximum((V - G) ** 2, (near - G) ** 2)
                losses.append(-gain + 0.7 * error / 2)
        by_hand.zero_grad()
        (sum(losses) / len(losses)).backward()
        norm = sum((p.grad**2).sum() for p in by_hand.parameters()).sqrt()
        assert norm > 0.5  # it is clipped
        with torch.no_grad():
            for weight in by_hand.parameters():
                weight -= 0.1 * weight.grad * 0.5 / norm
    for got, want in zip(policy.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


def test_a_gradient_that_overflows_moves_nothing(loop):
    """With loss scaling, as in float16: the scaler skips the step."""
    policy = PolicyWithValueHead(small_lm()).float().eval()
    rollout = collect(loop, policy, freeze(copy.deepcopy(policy.lm)))
    before = copy.deepcopy(policy.state_dict())
    policy.value_head.weight.register_hook(lambda grad: grad * float("inf"))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    adam = torch.optim.AdamW(policy.parameters(), fused=True)  # as in the notebook
    update(loop, policy, rollout, optimizer=guarded(policy, adam, scaler=scaler))
    for name, weight in policy.state_dict().items():
        assert torch.equal(weight, before[name])
    assert scaler.get_scale() == 4.0  # halved at each of the 8 steps


def test_an_interrupted_update_leaves_nothing_behind(loop, policy):
    """Interrupted before its first step, and run again: as if never interrupted."""
    rollout = collect(loop, policy, freeze(small_lm(seed=1)))
    undisturbed = copy.deepcopy(policy)
    update(loop, undisturbed, rollout)

    optimizer = guarded(policy)
    step = optimizer.step

    def interrupted(**figures):
        raise KeyboardInterrupt

    optimizer.step = interrupted
    with pytest.raises(KeyboardInterrupt):
        update(loop, policy, rollout, optimizer=optimizer)
    optimizer.step = step
    update(loop, policy, rollout, optimizer=optimizer)
    for got, want in zip(policy.parameters(), undisturbed.parameters(), strict=True):
        assert torch.equal(got, want)


def test_the_score_stands_on_the_eos(loop, policy):
    rollout = collect(loop, policy, freeze(copy.deepcopy(policy.lm)))
    last = rollout.mask.sum(1) - 1
    for row, t, s in zip(rollout.rewards, last, rollout.scores, strict=True):
        expected = torch.zeros_like(row)
        expected[t] = s  # the KL to an equal reference is 0
        torch.testing.assert_close(row, expected, atol=1e-9, rtol=0)


def test_the_first_ratio_is_one_and_the_last_is_not(loop):
    """In float32, as in a real run."""
    policy = PolicyWithValueHead(small_lm()).float().eval()
    reference = freeze(copy.deepcopy(policy.lm))
    rollout = collect(loop, policy, reference)
    with torch.no_grad():
        now, _ = loop["evaluate_responses"](policy, *rollout.texts)
    assert ((now - rollout.old_logprobs).exp() - 1).abs().max() <= 1e-5
    stats = update(loop, policy, rollout)
    assert (stats["ratio_max"][0] - 1).abs() <= 1e-5
    assert stats["approx_kl"][0] <= 1e-6
    assert (stats["ratio_max"][-1] - 1).abs() > 1e-3


def test_pieces_of_a_rollout_agree_with_the_whole(loop, policy):
    reference = freeze(small_lm(seed=1))
    pieces = dataclasses.replace(SETTINGS, ppo_micro_batch_size=4)
    whole = collect(loop, policy, reference)
    split = collect(loop, policy, reference, settings=pieces)
    for field in dataclasses.fields(Rollout):
        a, b = getattr(whole, field.name), getattr(split, field.name)
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


def test_micro_batches_make_the_same_step(loop, policy, optimizer=GuardedOptimizer):
    """Although responses differ in length: each piece weighs by its tokens."""
    settings = dataclasses.replace(SETTINGS, ppo_epochs=1, ppo_minibatch_size=24)
    rollout = collect(loop, policy, freeze(small_lm(seed=1)))
    assert len(set(rollout.mask.sum(1).tolist())) > 2
    results = []
    for size in (24, 4):
        trained = copy.deepcopy(policy)
        micro = dataclasses.replace(settings, ppo_micro_batch_size=size)
        made = guarded(trained, settings=micro, kind=optimizer)
        update(loop, trained, rollout, micro, made)
        results.append(torch.cat([p.detach().flatten() for p in trained.parameters()]))
    start = torch.cat([p.detach().flatten() for p in policy.parameters()])
    assert (results[0] - start).abs().max() > 1e-4
    torch.testing.assert_close(*results, atol=1e-7, rtol=0)


@pytest.mark.parametrize("size", [24, 12])
def test_every_response_is_used_once_an_epoch(loop, policy, size):
    rollout = collect(loop, policy, freeze(copy.deepcopy(policy.lm)))
    # the responses of the rollout, told apart by a number of their own
    rollout = dataclasses.replace(rollout, raw_scores=torch.arange(24.0))
    rollout = Rollout(**vars(rollout.rows(torch.arange(size))))
    seen = []

    def spy(policy, batch, settings):
        seen.append(batch.raw_scores.int().tolist())
        return loop["ppo_loss"](policy, batch, settings)

    settings = dataclasses.replace(SETTINGS, ppo_epochs=2)
    generator = torch.Generator().manual_seed(0)
    optimizer = guarded(policy)
    loop["ppo_update"](policy, optimizer, rollout, settings, generator, loss=spy)
    flat = [i for index in seen for i in index]
    assert sorted(flat[:size]) == sorted(flat[size:]) == list(range(size))
    assert flat[:size] != flat[size:]  # reshuffled
    assert all(len(index) == 12 for index in seen)


def test_the_learning_rate_rises_over_the_warmup_and_falls_to_0(loop):
    sizes = {"ppo_episodes": 24 * 6, "ppo_lr": 1.0, "value_head_lr": 10.0}
    settings = dataclasses.replace(SETTINGS, ppo_warmup=2, **sizes)
    run, found = loop["fresh_run"](small_lm(), settings), []
    for _ in range(7):
        found.append(run.decay.get_last_lr())
        run.optimizer.optimizer.step()
        run.decay.step()
    thirds = [1 / 3 * 6 / 6, 2 / 3 * 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0]
    assert [policy for policy, _ in found] == pytest.approx(thirds)
    assert [head for _, head in found] == pytest.approx([10 * x for x in thirds])


def test_the_update_changes_the_policy_and_nothing_else(loop, policy):
    reference = freeze(copy.deepcopy(policy.lm))
    rollout = collect(loop, policy, reference)
    frozen = copy.deepcopy(reference.state_dict())
    before = copy.deepcopy(policy.state_dict())
    update(loop, policy, rollout)
    assert not policy.training  # dropout stays off
    for name, weight in reference.state_dict().items():
        assert torch.equal(weight, frozen[name])
    changed = [
        n for n, w in policy.state_dict().items() if not torch.equal(w, before[n])
    ]
    assert "value_head.weight" in changed and "lm.transformer.wte.weight" in changed


def small_run(loop, **changes):
    """A run of PPO for a small model, its settings, and what `train` wants besides."""
    settings = dataclasses.replace(SETTINGS, ppo_episodes=600, ppo_lr=3e-3, **changes)
    lm = small_lm()
    models = (freeze(copy.deepcopy(lm)), score, lambda step: PROMPTS * 8, EOS)
    return loop["fresh_run"](lm, settings), models, settings


def test_ppo_finds_what_is_rewarded(loop):
    run, models, settings = small_run(loop, kl_coef=0.02)
    how = (loop["ppo_advantages"], loop["ppo_update"])
    loop["train"](run, *models, settings, *how)
    scores = [row["score"] for row in run.history]
    assert len(scores) == 25
    assert sum(scores[-5:]) / 5 > sum(scores[:5]) / 5 + 1.0


def test_an_estimator_of_ones_own_is_a_few_lines(loop):
    """RLOO (Kool et al. 2019; arXiv 2402.14740): four answers to each prompt.

    The advantage of each is its reward, KL included, less the mean of the other three.
    """

    def rloo_advantages(rollout, settings, kl_coef):
        kl = (rollout.old_logprobs - rollout.ref_logprobs).sum(dim=1)
        rewards = (rollout.scores - kl_coef * kl).view(-1, 4)
        advantages = (rewards - rewards.mean(dim=1, keepdim=True)) * 4 / 3
        advantages = advantages.view(-1, 1) * rollout.mask
        return dataclasses.replace(rollout, advantages=advantages, returns=advantages)

    run, models, settings = small_run(loop, kl_coef=0.02, value_coef=0.0)
    reference, score, _, eos_id = models
    prompts = [prompt for prompt in PROMPTS * 2 for _ in range(4)]
    how = (rloo_advantages, loop["ppo_update"])
    models = (reference, score, lambda step: prompts, eos_id)
    loop["train"](run, *models, settings, *how)
    scores = [row["score"] for row in run.history]
    assert sum(scores[-5:]) / 5 > sum(scores[:5]) / 5 + 1.0
    assert run.policy.value_head.weight.eq(0).all()  # no critic was trained
    source = inspect.getsource(rloo_advantages).strip().splitlines()
    assert len(source) <= 15


def test_training_stops_between_rollouts_and_goes_on(loop):
    """Interrupted after 7 of 25 and called again: the same run."""

    class Stop(Exception):
        pass

    def stop_at_7(step):
        if step == 7:
            raise Stop

    runs = []
    for pauses in ([None], [stop_at_7, None]):
        run, models, settings = small_run(loop)
        for pause in pauses:
            with contextlib.suppress(Stop):
                how = (loop["ppo_advantages"], loop["ppo_update"])
                loop["train"](run, *models, settings, *how, pause)
        runs.append(run)
    assert runs[0].history == runs[1].history and len(runs[0].history) == 25


def test_an_adaptive_beta_steers_the_kl(loop):
    """By hand: beta grows by what the KL of each rollout was above its target."""
    run, models, settings = small_run(loop, kl_target=0.3, kl_horizon=100)
    loop["train"](run, *models, settings, loop["ppo_advantages"], loop["ppo_update"])
    beta = settings.kl_coef
    for row in run.history:
        assert row["kl_coef"] == pytest.approx(beta, rel=1e-6)
        error = min(max(row["kl"] / 0.3 - 1, -0.2), 0.2)
        beta *= 1 + error * 24 / 100
    assert run.kl_coef == pytest.approx(beta, rel=1e-6)
    assert len({row["kl_coef"] for row in run.history}) > 20


def test_in_half_precision_the_first_ratio_is_still_near_one(loop):
    """The trunk in bfloat16, logits and everything after them in float32."""
    half = dataclasses.replace(SETTINGS, precision="bfloat16")
    policy = PolicyWithValueHead(small_lm()).float().eval()
    rollout = collect(loop, policy, freeze(copy.deepcopy(policy.lm)), settings=half)
    assert rollout.old_logprobs.dtype == rollout.old_values.dtype == torch.float32
    with torch.no_grad():
        exact, _ = loop["evaluate_responses"](policy, *rollout.texts)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            now, _ = loop["evaluate_responses"](policy, *rollout.texts)
    assert (exact - rollout.old_logprobs).abs().max() > 1e-4  # it was in bfloat16
    assert ((now - rollout.old_logprobs).exp() - 1).abs().max() <= 1e-2
