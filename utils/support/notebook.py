"""Notebooks as a source of code: show a function in one, take functions out of one."""

import ast
import inspect
import linecache
import textwrap
import traceback
from pathlib import Path

import datasets
import nbformat
import torch
import transformers
from huggingface_hub.utils import disable_progress_bars
from IPython import get_ipython
from IPython.display import Markdown

from utils.training import check_code_is_current

ROOT = Path(__file__).parents[2]
NOTEBOOKS = {  # in the order of the lessons, by number
    "1": "1-SFT.ipynb",
    "2": "2-RM Training.ipynb",
    "3": "3-RLHF.ipynb",
    "4": "more/4-Estimators.ipynb",
    "5": "more/5-Preferences.ipynb",
    "6": "more/6-Frontier.ipynb",
    "7": "more/7-Adapters.ipynb",
    "8": "more/8-Many Processes.ipynb",
    "9": "more/9-Use It.ipynb",
}
MEANT_FOR_PEOPLE = (torch.OutOfMemoryError, KeyboardInterrupt)
SERIES = ("1", "2", "3")  # what everybody reads; the others go further
# The loop of PPO, as cells of notebook 3
LOOP = (
    "fresh-run",
    "collect-rollout",
    "ppo-advantages",
    "ppo-loss",
    "ppo-update",
    "summarise",
    "train",
)

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
    sources = [textwrap.dedent(inspect.getsource(thing)) for thing in things]
    return Markdown("```python\n" + "\n\n".join(sources) + "```")


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


def somebody_is_there() -> bool:
    """Whether a person sits before this notebook, and not a program that executes it.

    Programs (nbclient, papermill) say with each cell that nobody can be asked anything.
    """
    kernel = getattr(get_ipython(), "kernel", None)
    return bool(getattr(kernel, "_allow_stdin", False))


def no_widgets():
    """Switch off the libraries' own bars: in a notebook they are widgets.

    Those are gone when the saved notebook is opened again, and GitHub refuses to show
    it. What takes long has a bar of text.
    """
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    disable_progress_bars()


def how_to_save_memory(settings, artefact: str) -> str:
    """Which numbers to lower if the GPU is too small to make this artefact."""
    numbers = [f"{n} ({getattr(settings, n)})" for n in NUMBERS_TO_LOWER[artefact]]
    return (
        f"lower {' or '.join(numbers)} (in CHANGES, in the first cell), and run again "
        "from there"
    )


def say_errors_in_a_sentence(advice: str = "run the cell again"):
    """From now on, an error that is meant for people ends a cell in one sentence.

    Only in a notebook. Those are the errors that `utils` raises itself, an interrupt,
    and a GPU that is full: then with this advice. What the failed cell held on the GPU
    is freed, so that it can be run again. Other errors keep their traceback.
    """
    if (shell := get_ipython()) is None:
        return

    def say(shell, kind, error, trace, tb_offset=None):
        if kind is torch.OutOfMemoryError:
            traceback.clear_frames(trace)  # they hold the tensors
            torch.cuda.empty_cache()
            error.args = (f"the GPU's memory is full; {advice}",)
        if kind in MEANT_FOR_PEOPLE or _raised_by_us(error, trace):
            said = str(error) or "run the cell again"
            error._render_traceback_ = lambda: [f"{kind.__name__}: {said}"]
        shell.showtraceback((kind, error, trace), tb_offset=tb_offset)

    shell.set_custom_exc((*MEANT_FOR_PEOPLE, Exception), say)


def _raised_by_us(error, trace) -> bool:
    """Whether a line of `utils` raised it on purpose, with a sentence.

    Not a formula: who has called that wrongly wants to see where.
    """
    *_, (frame, line) = traceback.walk_tb(trace)
    file = Path(frame.f_code.co_filename)
    formulas = [ROOT / "utils" / name for name in ("ppo.py", "fast.py")]
    if not file.is_relative_to(ROOT / "utils") or file in formulas:
        return False
    return linecache.getline(str(file), line).strip().startswith("raise ")
