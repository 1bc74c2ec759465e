"""Known mistakes of PPO's loop: each is made, and a test of the loop must fail.

Mistakes of the formulas are in `practice/checks` and tried in `test_checks.py`, those
of what PPO starts from in `test_preflight.py`, two more in `test_exact_world.py`.
"""

import inspect
import textwrap

import nbformat
import pytest

from utils import training
from utils.runs import NOTEBOOKS, ROOT

WHITEN = "advantages = masked_whiten(advantages, mask)"
WHITENED_AGAIN = "batch.old_logprobs, masked_whiten(batch.advantages, batch.mask)"
GUARD = """    if pi_stats["ratio_mean"] > 10:
        pi_loss, v_loss = pi_loss * 0, v_loss * 0
    losses = {"""
SHUFFLE = """    prompts = [prompts[i] for i in torch.randperm(len(prompts))]
    models, size"""
MISTAKES = {  # what: the cell of notebook 3, what stands there, and what is wrong
    "KL of the policy to itself": (
        "collect-rollout",
        "response_logprobs(reference,",
        "response_logprobs(policy.lm,",
    ),
    "old log-probs without the temperature": (
        "collect-rollout",
        "evaluate_responses(policy, *some, tau)",
        "evaluate_responses(policy, *some)",
    ),
    "raw scores in the rewards": (
        "ppo-advantages",
        "rollout.scores,",
        "rollout.raw_scores,",
    ),
    "returns made of whitened advantages": (
        "ppo-advantages",
        WHITEN,
        f"{WHITEN}; returns = advantages + values",
    ),
    "advantages not whitened": ("ppo-advantages", f"    {WHITEN}\n", ""),
    "advantages whitened again in each piece": (
        "ppo-loss",
        "batch.old_logprobs, batch.advantages",
        WHITENED_AGAIN,
    ),
    "a guard zeroes the loss, and still steps": ("ppo-loss", "    losses = {", GUARD),
    "micro-batches weigh by rows": (
        "ppo-loss",
        "piece.n_tokens / batch.n_tokens",
        "len(piece) / len(batch)",
    ),
    "gradients pile up": ("ppo-loss", "    optimizer.zero_grad()\n", ""),
    "permutation larger than the batch": (
        "ppo-update",
        "randperm(len(rollout)",
        "randperm(2 * len(rollout)",
    ),
    "minibatches never reshuffled": (
        "ppo-update",
        "split(settings.ppo_minibatch_size, order)",
        "split(settings.ppo_minibatch_size)",
    ),
    "dropout during the update": (
        "ppo-update",
        "figures = gradients(policy, ",
        "figures = gradients(policy.train(), ",
    ),
    "held-out prompts reshuffled": ("evaluate", "    models, size", SHUFFLE),
    "DPO: dropout on": ("train-dpo", "lm.eval()", "lm.train()"),
    "scaled gradients are clipped": (
        None,  # a method of utils/training.py
        "self.scaler.unscale_(self.optimizer)",
        "",
    ),
}
TESTS = {"evaluate": "test_evaluation.py", "train-dpo": "test_lesson_5.py"}


def changed(source, old, new):
    assert source.count(old) == 1, f"{source.count(old)} places to change: {old!r}"
    return source.replace(old, new)


def change_cell(monkeypatch, cell_id, old, new):
    """Whoever reads the notebook from now on finds this cell changed."""
    read = nbformat.read
    lesson = NOTEBOOKS["6" if cell_id == "train-dpo" else "3"]

    def read_changed(path, *arguments, **options):
        notebook = read(path, *arguments, **options)
        if path == ROOT / lesson:
            (cell,) = (cell for cell in notebook.cells if cell.id == cell_id)
            cell.source = changed(cell.source, old, new)
            compile(cell.source, cell_id, "exec")
        return notebook

    read_changed(ROOT / lesson, as_version=4)  # there is such a place
    monkeypatch.setattr(nbformat, "read", read_changed)


def change_step(monkeypatch, old, new):
    """The optimiser takes its steps in a changed way."""
    step = training.GuardedOptimizer.step
    namespace = {}
    source = changed(textwrap.dedent(inspect.getsource(step)), old, new)
    exec(source, vars(training), namespace)
    monkeypatch.setattr(training.GuardedOptimizer, "step", namespace["step"])


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_of_the_loop_is_caught(mistake, monkeypatch):
    cell_id, old, new = MISTAKES[mistake]
    if cell_id:
        change_cell(monkeypatch, cell_id, old, new)
    else:
        change_step(monkeypatch, old, new)
    tests = ROOT / "tests" / TESTS.get(cell_id, "test_loop.py")
    found = pytest.main(["-x", "-q", "-p", "no:cacheprovider", str(tests)])
    assert found == pytest.ExitCode.TESTS_FAILED
