"""What a notebook shows: pictures, errors in a sentence; and what a tracker gets."""

import base64
import dataclasses
import importlib.util
import io
import re
from unittest.mock import Mock, call

import accelerate
import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image

from practice.cells import LOOP, import_cells
from tests.conftest import ROOT, refused
from utils.runs import code_hash, start_tracker
from utils.settings import TINY

FULL_GPU = """
import torch, weakref
from utils.runs import code_hash, say_errors_in_a_sentence
say_errors_in_a_sentence("policy")
class Big: pass
def fill():
    big, names = Big(), globals()
    names["held"] = weakref.ref(big)
    raise torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB.")
fill()
"""
LOOP_HASH = f"""from practice.cells import import_cells
loop = import_cells("3-RLHF.ipynb", *{LOOP})
print(code_hash(*(loop[name] for name in ("train", "ppo_update"))), end="")"""
NO_ROOM = 'raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")'
UNKNOWN = "from utils.settings import load_settings; load_settings('tyni')"
CELLS = {  # of one kernel: all that is said, or that it has the lines of a traceback
    FULL_GPU: r"OutOfMemoryError: CUDA out of memory.*; lower ppo_micro_batch_size, .*",
    "print(held() is None)": "True\n",
    NO_ROOM: r"RuntimeError: .*ALLOC_FAILED; lower ppo_micro_batch_size, .*",
    UNKNOWN: "ValueError: there is no preset 'tyni'; the nearest is 'tiny'",
    "raise KeyboardInterrupt": "KeyboardInterrupt: run the cell again",
    # an accident, here or in utils; and whoever calls a formula wrongly
    "1 / 0": "(?s).+\n.+Error.+",
    "from utils.data import pad; pad([None], 0)": "(?s).+\n.+Error.+",
    "from utils import ppo; ppo.entropy(held, held)": "(?s).+\n.+Error.+",
    LOOP_HASH: "hash",
    "from utils.plots import *; figure = plot_rewards([0.5], [0.7])": "picture",
}


@pytest.mark.faults
def test_a_real_kernel():
    """Errors, edits and pictures; the full GPU is raised by hand, as none is here."""
    notebook = new_notebook(cells=[new_code_cell(source) for source in CELLS])
    path = {"metadata": {"path": str(ROOT)}}
    NotebookClient(notebook, timeout=None, allow_errors=True, resources=path).execute()
    nbformat.validate(notebook)
    *cells, picture = notebook.cells
    loop = import_cells("3-RLHF.ipynb", *LOOP)  # in another process than the kernel's
    our_hash = code_hash(*(loop[name] for name in ("train", "ppo_update")))
    for cell in cells:
        outputs = [x.get("text") or "\n".join(x.traceback) for x in cell.outputs]
        expected = CELLS[cell.source].replace("hash", our_hash)
        assert re.fullmatch(expected, "".join(outputs)), cell.source
    (picture,) = picture.outputs
    png = Image.open(io.BytesIO(base64.b64decode(picture.data["image/png"])))
    alt = "Rewards of the same prompts' responses before and after PPO."
    assert png.size == (1200, 600)  # 6 by 3 inches, sharp on any screen
    assert picture.metadata["image/png"] == {"alt": alt, "width": 600}


def test_a_tracker_that_is_missing_is_one_sentence(tmp_path):
    """Else a run of hours would be sent nowhere; and nothing is sent unasked."""
    settings = dataclasses.replace(TINY, runs_dir=str(tmp_path))
    start_tracker(settings)({"kl": 1.0}, 1)
    assert not list(tmp_path.iterdir())
    names = ("tensorboard", "wandb", "trackio")
    for name in [x for x in names if not importlib.util.find_spec(x)]:
        named = dataclasses.replace(settings, log_to=name)
        refused(f"{name}.*pip install.*log_to to ''$", start_tracker, named)


def test_a_tracker_that_breaks_ends_no_training(tmp_path, monkeypatch):
    """What it may end is a run that has not begun."""
    settings = dataclasses.replace(TINY, runs_dir=str(tmp_path), log_to="wandb")
    monkeypatch.setattr(accelerate, "Accelerator", Mock())
    tracker = accelerate.Accelerator.return_value
    tracker.log.side_effect = [None, ConnectionError("the line is dead"), None]
    log = start_tracker(settings)
    log({"kl": 1.0}, 1)
    with pytest.warns(UserWarning, match="wandb .* step 2 .*the line is dead"):
        log({"kl": 2.0}, 2)
    log({"kl": 3.0}, 3)
    sent = [call({"kl": float(step)}, step=step) for step in (1, 2, 3)]
    assert tracker.log.call_args_list == sent
    how = {"log_with": "wandb", "project_dir": settings.folder}
    accelerate.Accelerator.assert_called_once_with(**how)
    tracker.init_trackers.side_effect = ValueError("no API key\nlog in first")
    refused("^cannot send .*no API key log in first", start_tracker, settings)
