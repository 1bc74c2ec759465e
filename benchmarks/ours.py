"""The loops of the notebooks: their own cells, with a clock around them."""

import contextlib
import dataclasses
import io
import time
import unittest.mock

import torch

from benchmarks.work import peak_memory
from utils.models import load_causal_lm
from utils.rollout import evaluate_responses
from utils.settings import autocast, grad_scaler, seed_everything
from utils.support.notebook import import_cells


def ppo(work, watch):
    """`collect_rollout` and `ppo_update` of notebook 3."""
    cells = ("fresh-policy", "collect-rollout", "ppo-update")
    loop, settings = import_cells("3-RLHF.ipynb", *cells), work.settings
    sample, score = loop["sample_responses"], work.score
    loop["sample_responses"] = watch.timed("generate", sample)
    score = watch.timed("score", score)
    collect = watch.timed("log-probs", loop["collect_rollout"])
    update = watch.timed("update", loop["ppo_update"])
    lm = load_causal_lm(work.model, work.device)
    policy, optimizer, decay = loop["fresh_policy"](lm, settings)
    scaler = grad_scaler(settings, work.device)
    generator = torch.Generator(work.device).manual_seed(work.seed)
    for step in range(settings.ppo_steps):
        prompts, beta = work.prompts_of(step), settings.kl_coef
        models = (policy, work.reference, score)
        rollout = collect(*models, prompts, work.stop_id, settings, beta, generator)
        update(policy, optimizer, scaler, rollout, settings, generator)
        decay.step()
        watch.rollout_done(policy.lm)


@torch.no_grad()
def first_ratio(work):
    """The largest |ratio - 1| before the first step, over shuffled minibatches."""
    loop = import_cells("3-RLHF.ipynb", "fresh-policy", "collect-rollout")
    seed_everything(work.seed)
    settings, worst = work.settings, 0.0
    lm = load_causal_lm(work.model, work.device)
    policy = loop["fresh_policy"](lm, settings)[0]
    generator = torch.Generator(work.device).manual_seed(work.seed)
    models = (policy, work.reference, work.score)
    options = (work.stop_id, settings, settings.kl_coef, generator)
    rollout = loop["collect_rollout"](*models, work.prompts_of(0), *options)
    for index in torch.randperm(len(rollout)).split(settings.ppo_minibatch_size):
        part = rollout.rows(index)
        with autocast(settings, work.device):
            logprobs, _ = evaluate_responses(
                *(policy, part.input_ids, part.attention_mask, part.host_mask),
                settings.temperature,
            )
        off = ((logprobs - part.old_logprobs).exp() - 1).abs().max().item()
        worst = max(worst, off)
    return worst


def train_as_in(notebook, cells, work, trained, **names):
    """Run the training cell of a notebook, with all that it takes from others."""
    seconds = []

    def clock(batches, **_):
        started = time.perf_counter()
        yield from batches
        seconds.append(time.perf_counter() - started)

    settings = dataclasses.replace(work.settings, model_name=work.model)
    names |= {"settings": settings, "device": work.device}
    names["tokenizer"] = work.tokenizer
    quiet = contextlib.redirect_stdout(io.StringIO())
    with quiet, unittest.mock.patch("tqdm.tqdm", clock):  # imported by the cell
        model = import_cells(notebook, *cells, names=names)["model"]
    if trained:
        model.save_pretrained(trained)
        work.tokenizer.save_pretrained(trained)
    return {"seconds": seconds[-1], "memory": peak_memory(work.device)}


def sft(work, rows, trained=None):
    """The training cell of notebook 1; the model is kept in `trained`."""
    kept = {"train": [row for row, _ in rows], "validation": [rows[0][0]]}
    cells = ("batch-loss", "validate", "train-prepare", "train")
    return train_as_in(
        *("1-SFT.ipynb", cells, work, trained), kept=kept, pretrained=work.reference
    )


def rm(work, rows, trained=None):
    """The training cell of notebook 2; the model is kept in `trained`."""
    splits = {"train": rows, "validation": rows[:1]}
    return train_as_in(
        *("2-RM Training.ipynb", ("model", "scores", "validate", "train")),
        *(work, trained),
        rows={name: [row for row, _ in some] for name, some in splits.items()},
        labels={
            name: torch.tensor([float(y) for _, y in some])
            for name, some in splits.items()
        },
    )
