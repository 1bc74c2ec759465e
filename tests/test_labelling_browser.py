"""The labeller's box in a real browser: clicks, keys, and a kernel killed between."""

import importlib.metadata
import importlib.util
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass

import nbformat
import pytest

from tests.browser import classic_notebook, jupyter_lab, page_at
from tests.conftest import ROOT
from utils.preferences import read_pairs

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
NEEDED = {
    "Chromium": CHROMIUM,
    "websocket-client": importlib.util.find_spec("websocket"),
}


def major(package):
    """The first number of its version; 0 if it is not here."""
    try:
        return int(importlib.metadata.version(package).split(".")[0])
    except importlib.metadata.PackageNotFoundError:
        return 0


SESSION = "window.jupyterapp.shell.currentWidget.sessionContext.session"


@dataclass(frozen=True)
class FrontEnd:
    """What shows a notebook, and how a script finds its way about in it."""

    name: str
    serve: Callable
    address: str  # of the notebook, under the server's
    missing: str  # what it needs; empty if that is there
    # Expressions and a statement of JavaScript
    idle: str
    run_all: str
    died: str
    dialog: str


LAB = FrontEnd(
    "JupyterLab",
    jupyter_lab,
    "lab/tree/label.ipynb",
    "" if major("jupyterlab") else "JupyterLab",
    idle=f"{SESSION}.kernel.status == 'idle'",
    run_all="window.jupyterapp.commands.execute('notebook:run-all-cells')",
    died=f"['autorestarting','restarting'].includes({SESSION}.kernel.status)"
    f" || document.querySelector('.jp-Dialog')",
    dialog=".jp-Dialog .jp-mod-accept",
)
# What Colab's widgets are of: the protocol of ipywidgets 7
CLASSIC = FrontEnd(
    "classic",
    classic_notebook,
    "notebooks/label.ipynb",
    ""
    if (major("notebook"), major("ipywidgets")) == (6, 7)
    else "notebook==6.5.7 and ipywidgets==7.7.1",
    idle="Jupyter.notebook.kernel.widget_manager"
    " && document.querySelector('.kernel_idle_icon')",
    run_all="Jupyter.notebook.execute_all_cells()",
    died="document.querySelector('.modal.in .btn-primary')",
    dialog=".modal.in .btn-primary",
)


def front_end(one):
    missing = [name for name, found in NEEDED.items() if not found]
    missing += [one.missing] if one.missing else []
    reason = f"needs {' and '.join(missing)}"
    return pytest.param(
        one, id=one.name, marks=pytest.mark.skipif(bool(missing), reason=reason)
    )


pytestmark = pytest.mark.slow
N = 36  # pairs; with those that are asked twice, forty questions
CELL = f"""
import os
from pathlib import Path
from utils.labelling import Labeller, labelling_box, make_questions

Path("kernel.txt").write_text(str(os.getpid()))
pairs = [("the film is", f" fine <b>{{i}}</b> .", f" dull {{i}} & slow .")
         for i in range({N})]
labeller = Labeller(make_questions(pairs, seed=1), "mine.jsonl")
assert len(labeller.questions) == 40
labelling_box(labeller)
"""
STATUS = "[...document.querySelectorAll('.widget-html')].map(x => x.innerText).join()"


def button(name):
    every = "[...document.querySelectorAll('.widget-button')]"
    return f"{every}.find(x => x.innerText.startsWith('{name}'))"


FIELD = "document.querySelector('.widget-text input')"


@pytest.mark.parametrize("front", [front_end(LAB), front_end(CLASSIC)])
def test_forty_pairs_by_clicks_and_keys_and_a_kernel_killed(tmp_path, front):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, tmp_path / "label.ipynb")
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path / "home")}
    ours = tmp_path / "mine.jsonl", tmp_path / "mine.again.jsonl"

    with (
        front.serve(tmp_path, environ) as server,
        page_at(CHROMIUM, f"{server}/{front.address}", tmp_path / "profile") as page,
    ):

        def run_the_cell():
            page.until(front.idle)
            page.run(front.run_all)

        def until_it_says(words):
            page.until(f"{STATUS}.includes({words!r})")

        def answer(how, number):
            """The same by a click or a key, in turn; it counts when the box says so."""
            if number % 2:
                page.click(button(f"{how}:"))
            else:
                page.click(FIELD)
                page.key(how)

        run_the_cell()
        until_it_says("0 of 40")
        page.picture(tmp_path / "begin.png")
        for number in range(20):
            answer("12"[number % 3 == 0], number)
            until_it_says(f"{number + 1} of 40")
        page.picture(tmp_path / "middle.png")

        os.kill(int((tmp_path / "kernel.txt").read_text()), signal.SIGKILL)
        before = [path.read_bytes() for path in ours]
        assert sum(data.count(b"\n") for data in before) == 20
        page.until(front.died)
        page.run(f"document.querySelector('{front.dialog}')?.click()")
        run_the_cell()
        until_it_says("20 of 40")
        assert [path.read_bytes() for path in ours] == before

        answer("s", 20)
        until_it_says("1 skipped")
        answer("u", 21)
        until_it_says("0 skipped")
        for number in range(20, 40):
            answer("1", number)
            until_it_says(f"{number + 1} of 40")
        until_it_says("All questions are answered")
        page.picture(tmp_path / "end.png")

    pairs, faults = read_pairs(ours[0])
    again, more = read_pairs(ours[1])
    assert (len(pairs), len(again), faults, more) == (N, 4, [], [])
    assert not (tmp_path / "mine.skipped.jsonl").read_text()
