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
from utils.support.notebook import LOOP, NOTEBOOKS, import_cells
from utils.training import autocast, seed_everything


def ppo(work, watch):
    """`train` of notebook 3, with its own parts."""
    loop, settings = import_cells(NOTEBOOKS["3"], *LOOP), work.settings
    for name, phase in (
        ("sample_responses", "generate"),
        ("collect_rollout", "log-probs"),
        ("ppo_update", "update"),
    ):
        loop[name] = watch.timed(phase, loop[name])
    run = loop["fresh_run"](load_causal_lm(work.model, work.device), settings)
    run.generator.manual_seed(work.seed)

    def pause(step):
        if step:
            watch.rollout_done(run.policy.lm)

    loop["train"](
        run,
        work.reference,
        watch.timed("score", work.score),
        work.prompts_of,
        work.stop_id,
        settings,
        loop["ppo_advantages"],
        loop["ppo_update"],
        pause,
    )


@torch.no_grad()
def first_ratio(work):
    """The largest |ratio - 1| before the first step, over shuffled minibatches."""
    loop = import_cells(NOTEBOOKS["3"], *LOOP)
    seed_everything(work.seed)
    settings, worst = work.settings, 0.0
    run = loop["fresh_run"](load_causal_lm(work.model, work.device), settings)
    run.generator.manual_seed(work.seed)
    rollout = loop["collect_rollout"](
        run.policy,
        work.reference,
        work.score,
        work.prompts_of(0),
        work.stop_id,
        settings,
        run.generator,
    )
    for index in torch.randperm(len(rollout)).split(settings.ppo_minibatch_size):
        part = rollout.rows(index)
        with autocast(settings, work.device):
            logprobs, _ = evaluate_responses(
                run.policy, *part.texts, settings.temperature
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
    names = {"kept": kept, "pretrained": work.reference}
    return train_as_in(NOTEBOOKS["1"], cells, work, trained, **names)


def rm(work, rows, trained=None):
    """The training cell of notebook 2; the model is kept in `trained`."""
    splits = {"train": rows, "validation": rows[:1]}
    cells = ("model", "scores", "validate", "train")
    rows = {name: [row for row, _ in some] for name, some in splits.items()}
    labels = {
        name: torch.tensor([float(y) for _, y in some]) for name, some in splits.items()
    }
    names = {"rows": rows, "labels": labels}
    return train_as_in(NOTEBOOKS["2"], cells, work, trained, **names)
