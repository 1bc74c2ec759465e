"""Notebooks as a source of code: show a function in one, take functions out of one."""

import ast
import inspect
import traceback
from pathlib import Path

import nbformat
import torch
from IPython import get_ipython
from IPython.display import Markdown

from utils.training import check_code_is_current

ROOT = Path(__file__).parents[2]
NOTEBOOKS = {  # in the order of the lessons, by number
    "1": "1-SFT.ipynb",
    "2": "2-RM Training.ipynb",
    "3": "3-RLHF.ipynb",
    "4": "more/4-Estimators.ipynb",
    "6": "more/6-Frontier.ipynb",
}
SERIES = ("1", "2", "3")  # what everybody reads; the others go further

# What takes memory while each artefact is made
NUMBERS_TO_LOWER = {
    "sft": ["sft_batch_size"],
    "reward_model": ["rm_batch_size"],
    "policy": [
        "ppo_micro_batch_size",
        "ppo_minibatch_size",
        "ppo_rollout_size",
        "max_new_tokens",
    ],
}


def show_source(*things) -> Markdown:
    """The source of functions or classes, for display in a notebook.

    Raises RuntimeError if it is no longer what the kernel runs.
    """
    check_code_is_current()
    return Markdown("```python\n" + "\n\n".join(map(inspect.getsource, things)) + "```")


def import_cells(notebook: str, *cell_ids: str, names: dict | None = None) -> dict:
    """Run a notebook's imports and the cells with these ids; the names they define.

    `names` is what they may take from other cells. Raises KeyError, listing the cells
    there are, if one is missing.
    """
    cells = nbformat.read(ROOT / notebook, as_version=4).cells
    sources = {cell.id: cell.source for cell in cells if cell.cell_type == "code"}
    for cell_id in cell_ids:
        if cell_id not in sources:
            raise KeyError(f"{notebook} has no code cell {cell_id!r}: {list(sources)}")
    imports = [
        node
        for source in sources.values()
        for node in ast.parse(source).body
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    namespace = {"__name__": Path(notebook).stem}
    exec(compile(ast.Module(imports, []), notebook, "exec"), namespace)
    namespace.update(names or {})
    for cell_id in cell_ids:
        exec(compile(sources[cell_id], f"{notebook}#{cell_id}", "exec"), namespace)
    return namespace


def advise_on_memory(settings, artefact: str):
    """From now on, a GPU that is full ends a cell with the numbers to lower.

    Only in a notebook. `artefact` is what this one makes. What the failed cell held on
    the GPU is freed, so that it can be run again.
    """
    if (shell := get_ipython()) is None:
        return
    numbers = [f"{n} ({getattr(settings, n)})" for n in NUMBERS_TO_LOWER[artefact]]
    advice = (
        f"the GPU's memory is full; lower {' or '.join(numbers)} "
        "(as RLHF_... in the environment), and run again from the settings cell"
    )

    def advise(shell, kind, error, trace, tb_offset=None):
        traceback.clear_frames(trace)  # they hold the tensors
        torch.cuda.empty_cache()
        error.args = (advice,)
        error._render_traceback_ = lambda: [f"{kind.__name__}: {advice}"]
        shell.showtraceback((kind, error, trace), tb_offset=tb_offset)

    shell.set_custom_exc((torch.OutOfMemoryError,), advise)
