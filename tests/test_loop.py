"""`collect_rollout` and `ppo_update`, taken from notebook 3."""

import copy
import dataclasses

import pytest
import torch

from tests.test_rollout import EOS, PROMPTS, small_lm
from utils.models import PolicyWithValueHead, freeze
from utils.rollout import Rollout, has_ended, normalise_scores
from utils.settings import TINY
from utils.support.notebook import import_cells

SETTINGS = dataclasses.replace(
    TINY,
    ppo_episodes=48,
    ppo_rollout_size=24,
    ppo_minibatch_size=12,
    ppo_micro_batch_size=12,
    max_new_tokens=6,
)
SCALER = torch.amp.GradScaler("cpu", enabled=False)


@pytest.fixture(scope="module")
def loop():
    return import_cells("3-RLHF.ipynb", "collect-rollout", "ppo-update")


@pytest.fixture
def policy():
    policy = PolicyWithValueHead(small_lm()).double().eval()
    torch.nn.init.normal_(policy.value_head.weight, std=0.1)
    return policy


def score(ids, attention, mask):
    """1 for each token 3 in the response, if it ended; raw and normalised."""
    raw = ((ids[:, -mask.shape[1] :] == 3) & mask.bool()).sum(1).double()
    return raw, normalise_scores(raw, has_ended(ids, mask, EOS), 0.0, 1.0, -1.0)


def collect(loop, policy, reference, seed=0, settings=SETTINGS, kl_coef=0.1):
    generator = torch.Generator().manual_seed(seed)
    return loop["collect_rollout"](
        policy, reference, score, PROMPTS * 8, EOS, settings, kl_coef, generator
    )


def update(loop, policy, rollout, settings=SETTINGS, lr=1e-3):
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, eps=1e-5)
    generator = torch.Generator().manual_seed(0)
    return loop["ppo_update"](policy, optimizer, SCALER, rollout, settings, generator)


def test_a_rollout_adds_up(loop, policy):
    reference = freeze(small_lm(seed=1))
    rollout = collect(loop, policy, reference)
    mask = rollout.mask.bool()
    kl = (rollout.old_logprobs - rollout.ref_logprobs).sum(1)
    assert kl.abs().min() > 1e-3  # policy and reference do differ
    # all rewards of a response: its score, minus 0.1 a nat of KL
    total = rollout.rewards.sum(1)
    torch.testing.assert_close(total, rollout.scores - 0.1 * kl, atol=1e-9, rtol=0)
    # lambda = 0.95, but the advantages are whitened over the mask
    inside = rollout.advantages[mask]
    assert inside.mean().abs() < 1e-9 and (inside.var(correction=0) - 1).abs() < 1e-6
    # the last return of a response is its last reward: in the rewards' own units
    last = rollout.mask.sum(1) - 1
    rows = torch.arange(len(rollout))
    torch.testing.assert_close(
        rollout.returns[rows, last], rollout.rewards[rows, last], atol=1e-9, rtol=0
    )
    ended = has_ended(rollout.input_ids, rollout.mask, EOS)
    assert 0 < ended.sum() < len(rollout)
    assert (rollout.scores[~ended] == -1).all()


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


def test_micro_batches_make_the_same_step(loop, policy):
    """Although responses differ in length: each piece weighs by its tokens."""
    settings = dataclasses.replace(SETTINGS, ppo_epochs=1, ppo_minibatch_size=24)
    rollout = collect(loop, policy, freeze(small_lm(seed=1)))
    assert len(set(rollout.mask.sum(1).tolist())) > 2
    results = []
    for size in (24, 4):
        trained = copy.deepcopy(policy)
        micro = dataclasses.replace(settings, ppo_micro_batch_size=size)
        update(loop, trained, rollout, micro)
        results.append(torch.cat([p.detach().flatten() for p in trained.parameters()]))
    start = torch.cat([p.detach().flatten() for p in policy.parameters()])
    assert (results[0] - start).abs().max() > 1e-4
    torch.testing.assert_close(*results, atol=1e-7, rtol=0)


def test_every_response_is_used_once_an_epoch(loop, policy):
    rollout = collect(loop, policy, freeze(copy.deepcopy(policy.lm)))
    seen = []
    rows = rollout.rows

    def spy(index):
        seen.append(index.tolist())
        return rows(index)

    rollout.rows = spy
    update(loop, policy, rollout, dataclasses.replace(SETTINGS, ppo_epochs=2))
    flat = [i for index in seen for i in index]
    assert sorted(flat[:24]) == sorted(flat[24:]) == list(range(24))
    assert flat[:24] != flat[24:]  # reshuffled
    assert all(len(index) == 12 for index in seen)


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


def test_ppo_finds_what_is_rewarded(loop, policy):
    reference = freeze(copy.deepcopy(policy.lm))
    scores = []
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3, eps=1e-5)
    generator = torch.Generator().manual_seed(0)
    for seed in range(25):
        rollout = collect(loop, policy, reference, seed=seed, kl_coef=0.02)
        scores.append(rollout.scores.mean().item())
        loop["ppo_update"](policy, optimizer, SCALER, rollout, SETTINGS, generator)
    assert sum(scores[-5:]) / 5 > sum(scores[:5]) / 5 + 1.0


def test_in_half_precision_the_first_ratio_is_still_near_one(loop):
    """The trunk in bfloat16, logits and everything after them in float32."""
    half = dataclasses.replace(SETTINGS, precision="bfloat16")
    policy = PolicyWithValueHead(small_lm()).float().eval()
    rollout = collect(loop, policy, freeze(copy.deepcopy(policy.lm)), settings=half)
    assert rollout.old_logprobs.dtype == rollout.old_values.dtype == torch.float32
    exact = collect(loop, policy, freeze(copy.deepcopy(policy.lm)))
    shared = rollout.mask.shape == exact.mask.shape
    assert not shared or not torch.equal(rollout.old_logprobs, exact.old_logprobs)
    stats = update(loop, policy, rollout, half)
    assert (stats["ratio_max"][0] - 1).abs() <= 1e-3
