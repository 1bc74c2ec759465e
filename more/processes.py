"""PPO on several processes: `python -m more.processes --processes 2`.

The loop is notebook 3's. A process samples its share of the prompts and works out its
share of each minibatch; rollout, gradient and whatever decides something are those of
all. torchrun starts the processes and ends them together (`launch.py`); accelerate
carries what they say.

The gradient of a mean over all tokens is the sum over the processes of (their tokens /
all tokens) times the gradient of their own mean: weighed alike, a process with few
tokens would count too much. Li et al. 2020, "PyTorch Distributed" (arXiv 2006.15704).
"""

import argparse
import os
import sys
from functools import partial

import torch
from accelerate import PartialState
from accelerate.utils import gather, reduce
from accelerate.utils import pad_across_processes as pad
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from more.common import notebook_3
from more.launch import cores, launch, take_part
from utils import runs
from utils.__main__ import parse
from utils.evaluation import expected, figures_table
from utils.rollout import Rollout


def collect_together(
    collect, policy, reference, score, prompts, eos_id, settings, generator
) -> Rollout:
    """Everybody's rollout, of which this process samples and scores its share.

    `collect` is notebook 3's `collect_rollout`. The generator stays the same in all
    processes, and each draws from one of its own.
    """
    state, device = PartialState(), generator.device
    drawn = torch.randint(2**60, (), generator=generator, device=device).item()
    own = torch.Generator(device).manual_seed(drawn + state.process_index)
    with state.split_between_processes(prompts) as mine:
        rollout = collect(policy, reference, score, mine, eos_id, settings, own)
    width = rollout.mask.shape[1]
    found = {name: x for name, x in vars(rollout).items() if x is not None}
    del found["cpu_mask"]
    for name, fill in ("input_ids", eos_id), ("attention_mask", 0):
        prompt, response = found[name].tensor_split([-width], dim=1)
        prompt = pad(prompt, 1, fill, pad_first=True)
        found[name] = torch.cat([prompt, pad(response, 1, fill)], dim=1)
    return Rollout(**{k: gather(pad(x, 1)) for k, x in found.items()})


def gradients_together(gradients, policy, optimizer, batch, settings) -> dict:
    """Everybody's gradient of a minibatch, of which this process works out its share.

    `gradients` is notebook 3's. Dealt out from the shortest response to the longest,
    all processes have about as many tokens to read. Returns the figures of the whole
    minibatch, which are the same numbers in all processes.
    """
    state = PartialState()
    by_length = batch.cpu_mask.sum(dim=1).argsort(stable=True)
    mine = batch.rows(by_length[state.process_index :: state.num_processes])
    share = (mine.n_tokens / batch.n_tokens).item()
    figures = gradients(policy, optimizer, mine, settings)
    grads = [x.grad for x in policy.parameters() if x.grad is not None]
    vector_to_parameters(reduce(parameters_to_vector(grads) * share, "sum"), grads)
    own = torch.stack([*figures.values()])
    both = gather(torch.stack([own * share, own])[None])
    columns = zip(figures, both[:, 0].sum(dim=0), both[:, 1].amax(dim=0), strict=True)
    return {name: most if name[-4:] == "_max" else x for name, x, most in columns}


def train_together(settings):
    """PPO by all processes that were started together, of which the first one writes.

    It ends in the artefact `policy_processes`; any number of processes takes it up.
    """
    changes = {**settings.changes, "runs_dir": settings.runs_dir}
    settings, device = runs.prepare("policy", settings.preset, changes)
    state = PartialState(cpu=device.type == "cpu")
    # What it does before its loop; at last it looks whether PPO can learn
    three = notebook_3(settings, device, "start", "preflight", "preflight-learn")
    given = three.reference, three.score, three.prompts_of, three.eos_id, settings
    collect = partial(collect_together, three.collect_rollout)
    gradients = partial(gradients_together, three.gradients)
    how = three.ppo_advantages, partial(three.ppo_update, backward=gradients)
    code = three.fresh_run, three.prompts_of, three.score, three.train, *how, collect
    inputs = three.reference, three.reward_model, three.train_prompts
    checkpoint = runs.Checkpoint(run := three.run, settings, code, inputs)
    checkpoint.path = settings.folder / "ppo_processes.pt"
    with state.main_process_first():  # it renames one of another run
        checkpoint.restore()
    pause = (lambda step: checkpoint.save()) if state.is_main_process else None
    three.train(run, *given, *how, pause, collect)
    if state.is_main_process:
        after, _ = three.evaluate(run.policy)
        metrics = {"after": after, "history": run.history, "seconds": run.seconds}
        what = "policy_processes", run.policy.lm, three.tokenizer, metrics
        print(figures_table({}, after, expected(settings)))
        print(f"saved to {runs.save_artefact(settings, *what)}")
    state.destroy_process_group()


def main(argv: list[str]):
    """Start the processes; or be one of them, if they have been started."""
    parser = argparse.ArgumentParser(
        "python -m more.processes", epilog="--preset, --set: those of python -m utils"
    )
    parser.add_argument("--processes", type=int, default=2)
    options, rest = parser.parse_known_args(argv)
    ((_, settings),) = parse([*rest, "--only", "3"])[0].values()
    work, n = partial(train_together, settings), options.processes
    if "RANK" in os.environ:
        return take_part(work)
    size, gpus = settings.ppo_minibatch_size, torch.cuda.device_count()
    gpus = {"cpu": 0, "mps": 1}.get(settings.device, gpus)
    if n < 1 or size % n:
        parser.error(
            f"--processes must be 1 or more and divide ppo_minibatch_size ({size}), "
            f"which {n} does not; change one of them"
        )
    if 0 < gpus < n:
        parser.error(f"{n} processes on {gpus} GPUs; start {gpus}, or set device=cpu")
    if not gpus and n > max(2, cores()):
        parser.error(f"{n} processes on {cores()} cores; start as many as there are")
    try:
        runs.find_artefacts(settings, "sft", "reward_model")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return launch(n, "more.processes", argv) if n > 1 else work()


if __name__ == "__main__":
    main(sys.argv[1:])
