"""What a notebook shows: pictures, and errors in a sentence."""

import base64
import io
import re

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image

from practice.cells import LOOP, import_cells
from tests.conftest import ROOT
from utils.runs import code_hash

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
