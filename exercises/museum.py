"""The bug museum of exercise 6: PPO in the exact world, with one mistake at a time.

Six pieces of PPO, each wrong on purpose. `train` runs the loop of notebook 3 with one
of them in its place, or with a repaired one.
"""

import copy
import dataclasses

import matplotlib.pyplot as plt
import torch
from tqdm import tqdm

from practice import exact_world
from practice.cells import LOOP, import_cells
from utils.models import PolicyWithValueHead
from utils.ppo import masked_mean, policy_loss
from utils.training import GuardedOptimizer

# Nothing holds the steps back here, so that a mistake shows
SETTINGS = dataclasses.replace(
    exact_world.SETTINGS,
    kl_coef=0.5,
    ppo_episodes=20 * 256,
    ppo_minibatch_size=128,
    ppo_lr=4e-3,
    clip_range=0.2,
    max_approx_kl=0.0,
)
CURVES = {
    "score": "score",
    "kl": "KL to the reference [nats]",
    "ratio_max": "largest ratio",
    "clip_fraction": "clip fraction",
    "value_loss": "value loss",
    "explained_variance": "explained variance",
}


def prepare(lm, lr):
    """The policy, a copy of this model, and an optimiser for its weights."""
    optimizer = torch.optim.AdamW(lm.parameters(), lr=lr, eps=1e-5, weight_decay=0.0)
    policy = copy.deepcopy(lm)
    return policy, optimizer


def penalised_rewards(scores, log_ratio, lengths, beta):
    """What each token is paid (B, T): the KL penalty, and the score at the end."""
    places = torch.arange(log_ratio.shape[1])
    rewards = beta * log_ratio
    rewards = rewards + scores[:, None] * (places == lengths[:, None] - 1)
    return rewards * (places < lengths[:, None])


def make_reference(lm):
    """The frozen model that KL is measured against."""
    return lm


def surrogate(log_ratio, advantages, eps):
    """The loss of each token, before the mean is taken."""
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - eps, 1 + eps)
    return torch.minimum(-advantages * ratio, -advantages * clipped)


def place_scores(scores, lengths, width):
    """A tensor (B, width) with the score of each response on its last token."""
    places = torch.arange(width)
    return scores[:, None] * (places == lengths[:, None])


def advantages_and_returns(delta, values, lengths, decay):
    """Advantages from residuals delta (B, T), and the values' targets; 0 outside."""
    inside = torch.arange(delta.shape[1]) < lengths[:, None]
    delta, advantages = delta * inside, torch.zeros_like(delta)
    following = torch.zeros(len(delta))
    for t in reversed(range(delta.shape[1])):
        following = delta[:, t] + decay * following
        advantages[:, t] = following
    real = advantages[inside]
    advantages = (advantages - real.mean()) / real.std(correction=0) * inside
    return advantages, (advantages + values) * inside


# In the order of the exhibition
RUNS = (prepare, penalised_rewards, make_reference, surrogate, place_scores)
RUNS += (advantages_and_returns,)


def _in_its_place(name, piece) -> dict:
    """The function of the loop that calls the piece, by the name that it replaces."""

    def rewards(scores, logprobs, ref_logprobs, mask, beta):
        log_ratio, lengths = (logprobs - ref_logprobs) * mask, mask.sum(dim=1)
        if name == "penalised_rewards":
            return piece(scores, log_ratio, lengths, beta)
        return -beta * log_ratio + piece(scores, lengths, mask.shape[1]) * mask

    def gae(rewards, values, mask, gamma, lam):
        values = values * mask
        following = torch.nn.functional.pad(values[:, 1:], (0, 1))
        delta = (rewards + gamma * following - values) * mask
        return piece(delta, values, mask.sum(dim=1), gamma * lam)

    def loss(logprobs, old_logprobs, advantages, mask, eps):
        losses = piece((logprobs - old_logprobs) * mask, advantages * mask, eps)
        stats = policy_loss(logprobs, old_logprobs, advantages, mask, eps)[1]
        return masked_mean(losses, mask), stats

    return {
        "penalised_rewards": {"token_rewards": rewards},
        "place_scores": {"token_rewards": rewards},
        "advantages_and_returns": {"compute_gae": gae},
        "surrogate": {"policy_loss": loss},
    }.get(name, {})


def exhibit(number: int) -> list[dict]:
    """One of the six runs, 1 to 6, without a word about what is wrong with it."""
    piece = RUNS[number - 1]
    return train(piece.__name__, piece, f"run {number}")


def train(name="", piece=None, title="") -> list[dict]:
    """The figures of each rollout of a run, with a piece in the place of a right one.

    `name` is that of one of RUNS; without it the run is a healthy one. `title` stands
    at the progress bar.
    """
    s, loop = SETTINGS, import_cells("3-RLHF.ipynb", *LOOP)
    loop |= _in_its_place(name, piece)
    title = title or name or "healthy"
    loop["tqdm"] = lambda steps, *_, **__: tqdm(steps, desc=title)
    world = exact_world.ExactWorld(seed=7)
    lm, reference = copy.deepcopy(world.reference).requires_grad_(True), world.reference
    run = loop["fresh_run"](lm, s)
    if name == "prepare":
        lm, adam = piece(lm, s.ppo_lr)
        policy = PolicyWithValueHead(lm).eval()
        head = {"params": policy.value_head.parameters(), "lr": s.value_head_lr}
        adam.add_param_group(head)
        decay = torch.optim.lr_scheduler.ConstantLR(adam, factor=1.0)
        own = {"optimizer": GuardedOptimizer(policy, adam, s), "decay": decay}
        run = dataclasses.replace(run, policy=policy, **own)
    if name == "make_reference":
        reference = piece(run.policy.lm)
    prompts, how = [exact_world.PROMPT] * s.ppo_rollout_size, loop["ppo_advantages"]
    given = (reference, world.score, lambda step: prompts, exact_world.EOS, s, how)
    loop["train"](run, *given, loop["ppo_update"])
    return [{key: row[key] for key in CURVES} for row in run.history]


def plot(healthy, run, label):
    """The curves of a run beside those of a healthy one."""
    figure, axes = plt.subplots(2, 3, figsize=(10, 5), layout="constrained")
    for axis, (key, title) in zip(axes.flat, CURVES.items(), strict=True):
        axis.plot([row[key] for row in healthy], color="#8a8a8a", label="healthy")
        axis.plot([row[key] for row in run], color="#c8553d", label=label)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set(title=title, xlabel="rollout")
    axes.flat[0].legend(frameon=False)
    axes.flat[-1].set_ylim(-1.05, 1.05)  # equal returns can send it far below
    return figure
