"""What tests/test_processes.py asks of one process, and of each of two.

`python -m tests.processes_at_work FOLDER`, started by accelerate, writes what each
process found into the folder.
"""

import dataclasses
import os
import sys
from pathlib import Path

import torch

from tests.test_loop import SETTINGS, collect, make_policy, score
from tests.test_rollout import EOS, PROMPTS
from utils.lora import add_adapter, sharing
from utils.models import PolicyWithValueHead, freeze
from utils.processes import (
    divided,
    divided_like,
    join,
    shared,
    this_process,
    whole,
)
from utils.rollout import Rollout
from utils.support.artefacts import save_artefact
from utils.support.checkpoint import Checkpoint
from utils.support.notebook import LOOP, import_cells
from utils.training import accumulate_gradients

ROWS = torch.tensor([7, 0, 3, 11, 20, 5, 14, 2, 9, 16, 1])  # eleven: not to be halved
FAR = 14  # the row of which alone the policy has moved far, and PPO stops: one has it


def make_rollout(loop) -> Rollout:
    """A rollout with its advantages, of one process."""
    return collect(loop, make_policy(), freeze(make_policy().lm), settings=SETTINGS)


def fresh(loop, settings):
    """A run from the weights that all start from, but for the value head's zeros."""
    policy = make_policy().float()
    run = loop["fresh_run"](policy.lm, settings)
    assert isinstance(run.policy, PolicyWithValueHead)
    head = run.policy.value_head
    with torch.no_grad(), divided(run.policy):
        head.weight.copy_(divided_like(policy.value_head.weight, head.weight))
    return run


def gradients(loop, rollout) -> dict:
    """Of PPO's loss on some rows, in pieces of four, and the figures of the loss."""
    settings = dataclasses.replace(SETTINGS, ppo_micro_batch_size=4)
    run = fresh(loop, settings)
    # So that ratios and clipping differ from token to token
    with torch.no_grad(), divided(run.policy):
        run.policy.lm.transformer.wte.weight.add_(0.02)
    run.optimizer.zero_grad()
    batch = rollout.rows(ROWS)
    figures = accumulate_gradients(
        loop["ppo_loss"], run.policy, batch, run.optimizer, settings
    )
    with divided(run.policy):
        found = whole({n: p.grad for n, p in run.policy.named_parameters()})
    return {"gradients": found, "figures": figures}


def adapters(loop, rollout) -> dict:
    """One base for policy and reference: the adapter's gradients and the base after."""
    lm = add_adapter(make_policy().float().lm, "policy", rank=2)
    with torch.no_grad():  # a fresh adapter's A has no gradient
        for weight in lm.parameters():
            if weight.requires_grad:
                torch.nn.init.normal_(weight, std=0.1)
    base = {n: p.clone() for n, p in lm.named_parameters() if not p.requires_grad}
    reference = sharing(lm, None)
    run = loop["fresh_run"](lm, SETTINGS)
    run.optimizer.zero_grad()
    batch = rollout.rows(ROWS)
    accumulate_gradients(loop["ppo_loss"], run.policy, batch, run.optimizer, SETTINGS)
    trained = [(n, p) for n, p in lm.named_parameters() if p.requires_grad]
    found = {name: p.grad.clone() for name, p in trained}
    run.optimizer.step()
    moved = [n for n, p in lm.named_parameters() if n in base and (p != base[n]).any()]
    ids = torch.tensor([PROMPTS[0]])
    off = reference(ids).logits - make_policy().float().lm(ids).logits
    return {"gradients": found, "moved": moved, "off": off.abs().max().item()}


def steps_before_it_stops(loop, rollout) -> dict:
    """How many steps PPO takes if one response alone is far from the policy."""
    settings = dataclasses.replace(SETTINGS, max_approx_kl=0.1, ppo_epochs=3)
    run = fresh(loop, settings)
    old = rollout.old_logprobs.clone()
    old[FAR] -= 3 * rollout.mask[FAR]
    rollout = dataclasses.replace(rollout, old_logprobs=old)
    generator = torch.Generator().manual_seed(0)
    stats = loop["ppo_update"](run.policy, run.optimizer, rollout, settings, generator)
    return {"steps": stats["optimizer_steps"].item(), "kl": stats["approx_kl"]}


class Words:
    """A tokenizer that has nothing to save."""

    def save_pretrained(self, folder):
        """Write nothing."""


def checkpoint_of(run, folder) -> Checkpoint:
    """Of a run whose state lies in this folder."""
    settings = dataclasses.replace(SETTINGS, runs_dir=str(folder), checkpoint_every=1)
    return Checkpoint(run, settings, (), {})


def restored(loop, folder):
    """A fresh run, brought to where the saved one was, and its weights."""
    run = fresh(loop, SETTINGS)
    checkpoint_of(run, folder).restore()
    return run, weights_of(run)


def weights_of(run) -> dict:
    """The policy's weights, whole."""
    with divided(run.policy):
        return whole({n: p.detach() for n, p in run.policy.named_parameters()})


def whole_run(loop, folder) -> dict:
    """Two rollouts and updates from notebook 3's `train`, and the weights after.

    Saved, as checkpoint and as artefact, and taken up again.
    """
    run = fresh(loop, SETTINGS)
    reference = freeze(make_policy().float().lm)
    how = (loop["ppo_advantages"], loop["ppo_update"])
    seen = []

    def advantages(rollout, *options):
        seen.append(rollout)
        return how[0](rollout, *options)

    loop["train"](
        run, reference, score, lambda _: PROMPTS * 8, EOS, SETTINGS, advantages, how[1]
    )
    checkpoint_of(run, folder).save()
    settings = dataclasses.replace(SETTINGS, runs_dir=str(folder))
    save_artefact(settings, "policy", run.policy.lm, Words(), {})
    again = restored(loop, folder)[0]
    moments = [run.optimizer.state_dict(), again.optimizer.state_dict()]
    return {
        "history": run.history,
        "weights": weights_of(run),
        "restored": weights_of(again),
        "moments": [state["optimizer"]["state"] for state in moments],
        "rollouts": [
            {k: x for k, x in vars(rollout).items() if x is not None}
            for rollout in seen
        ],
        "generator": run.generator.get_state(),
    }


@shared("rows")
def weighted(model, rows):
    """A tensor with a row for each row."""
    return model(torch.tensor(rows)[:, None]).squeeze(1)


@shared("rows")
def summed(model, rows):
    """A sum with a gradient, and a number."""
    return weighted.__wrapped__(model, rows).square().sum(), torch.tensor(len(rows))


def parts_and_sums() -> dict:
    """What `shared` makes of rows and sums, with their gradients."""
    found = {}
    for n in (1, 5):
        rows = [float(i + 1) for i in range(n)]
        for name, work in (("rows", weighted), ("sums", summed)):
            torch.manual_seed(0)
            model = torch.nn.Linear(1, 1)
            result = work(model, rows)
            out = result.square() if name == "rows" else result[0] / result[1]
            out.sum().backward()
            found[name, n] = {"value": result, "gradient": model.weight.grad}
    return found


def measure(rollout: Rollout, folder) -> dict:
    """All of it; adapters only where the weights stay whole."""
    divides = "ACCELERATE_USE_FSDP" in os.environ
    loop = import_cells("3-RLHF.ipynb", *LOOP)
    return {
        **gradients(loop, rollout),
        "adapters": {} if divides else adapters(loop, rollout),
        "stops": steps_before_it_stops(loop, rollout),
        "run": whole_run(loop, folder),
        "shared": parts_and_sums(),
    }


def divide_on_a_cpu():
    """Let accelerate do on CPUs what it does on GPUs only: divide the weights."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    join("cpu")
    if os.environ.get("ACCELERATE_USE_FSDP"):
        divide_on_a_cpu()
    given = torch.load(folder / "rollout.pt", weights_only=True)
    found = measure(Rollout(**given), folder)
    torch.save(found, folder / f"{this_process()}.pt")
