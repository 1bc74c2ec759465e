"""Known mistakes of PPO's loop: each is made, and a test of the loop must fail.

Mistakes of the formulas are in `practice/checks` and tried in `test_checks.py`, those
of what PPO starts from in `test_preflight.py`.
"""

import pytest
import torch

from practice import cells
from utils.settings import NOTEBOOKS, ROOT

WHITEN = "advantages = masked_whiten(advantages, mask)"
AGAIN = "batch.old_logprobs, masked_whiten(batch.advantages, batch.mask)"
GUARD = """    if pi_stats["ratio_mean"] > 10:
        pi_loss, v_loss = pi_loss * 0, v_loss * 0
    losses = {"""
SHUFFLE = """    prompts = [prompts[i] for i in torch.randperm(len(prompts))]
    models, size"""
ROLLOUT, UPDATE, MICRO = "adds_up", "would_be_by_hand", "micro_batches"
FIGURE = "every_figure"
# What: the cell of notebook 3, what stands there, what is wrong, the test that fails
MISTAKES = {
    "KL of the policy to itself": (
        "collect-rollout", "response_logprobs(reference,",
        "response_logprobs(policy.lm,", ROLLOUT),
    "old log-probs without the temperature": (
        "collect-rollout", "evaluate_responses(policy, *some, tau)",
        "evaluate_responses(policy, *some)", ROLLOUT),
    "raw scores in the rewards": (
        "ppo-advantages", "rollout.scores,", "rollout.raw_scores,", ROLLOUT),
    "returns made of whitened advantages": (
        "ppo-advantages", WHITEN, f"{WHITEN}; returns = advantages + values", ROLLOUT),
    "advantages not whitened": ("ppo-advantages", f"    {WHITEN}\n", "", ROLLOUT),
    "advantages whitened again in each piece": (
        "ppo-loss", "batch.old_logprobs, batch.advantages", AGAIN, UPDATE),
    "a guard zeroes the loss, and still steps": (
        "ppo-loss", "    losses = {", GUARD, UPDATE),
    "micro-batches weigh by rows": (
        "ppo-loss", "piece.n_tokens / batch.n_tokens", "len(piece) / len(batch)",
        MICRO),
    "gradients pile up": ("ppo-loss", "    optimizer.zero_grad()\n", "", UPDATE),
    "permutation larger than the batch": (
        "ppo-update", "randperm(len(rollout)", "randperm(2 * len(rollout)", UPDATE),
    "minibatches never reshuffled": (
        "ppo-update", "split(settings.ppo_minibatch_size, order)",
        "split(settings.ppo_minibatch_size)", UPDATE),
    "dropout during the update": (
        "ppo-update", "figures = backward(policy, ",
        "figures = backward(policy.train(), ", UPDATE),
    "held-out prompts reshuffled": ("evaluate", "    models, size", SHUFFLE, FIGURE),
    "scaled gradients are clipped": (None, "", "", UPDATE),  # not in a cell: see below
}  # fmt: skip


def change_cell(monkeypatch, cell_id, old, new):
    """Whoever takes cells from the notebook from now on finds this one changed."""
    real = cells.sources

    def sources(notebook):
        found = real(notebook)
        if notebook == NOTEBOOKS["3"]:
            assert found[cell_id].count(old) == 1, old
            found[cell_id] = found[cell_id].replace(old, new)
        return found

    sources(NOTEBOOKS["3"])  # there is such a place
    monkeypatch.setattr(cells, "sources", sources)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_of_the_loop_is_caught(mistake, monkeypatch):
    cell_id, old, new, test = MISTAKES[mistake]
    if cell_id:
        change_cell(monkeypatch, cell_id, old, new)
    else:  # the scaler unscales too late: in its own step
        monkeypatch.setattr(torch.amp.GradScaler, "unscale_", lambda *_: None)
    file = "utils/test_evaluation.py" if test == FIGURE else "lessons/test_loop.py"
    options = ["-x", "-q", "-p", "no:cacheprovider", "-k", test]
    found = pytest.main([*options, str(ROOT / "tests" / file)])
    assert found == pytest.ExitCode.TESTS_FAILED
