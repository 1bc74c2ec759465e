"""The loops of the notebooks: their own cells, with a clock around them."""

import contextlib
import dataclasses
import io
import time
import unittest.mock

import torch

from more.common import peak_memory
from practice.cells import LOOP, import_cells
from utils.models import load_causal_lm
from utils.runs import NOTEBOOKS


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
    models = (work.reference, watch.timed("score", work.score))
    how = {"advantages": loop["ppo_advantages"], "update": loop["ppo_update"]}
    how |= {"collect": loop["collect_rollout"]}
    how |= {"pause": lambda step: watch.rollout_done()}
    loop["train"](run, *models, work.prompts_of, work.stop_id, settings, **how)


def train_as_in(notebook, cells, work, **names):
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
        import_cells(notebook, *cells, names=names)
    return {"seconds": seconds[-1], "memory": peak_memory(work.device)}


def sft(work, rows):
    """The training cell of notebook 1."""
    kept = {"train": [row for row, _ in rows], "validation": [rows[0][0]]}
    cells = ("batch-loss", "validate", "train-prepare", "train")
    names = {"kept": kept, "pretrained": work.reference}
    return train_as_in(NOTEBOOKS["1"], cells, work, **names)


def rm(work, rows):
    """The training cell of notebook 2."""
    splits = {"train": rows, "validation": rows[:1]}
    ids = {name: [row for row, _ in some] for name, some in splits.items()}
    labels = {
        name: torch.tensor([float(y) for _, y in some]) for name, some in splits.items()
    }
    cells = ("model", "scores", "validate", "train")
    return train_as_in(NOTEBOOKS["2"], cells, work, rows=ids, labels=labels)
