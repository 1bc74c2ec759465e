"""The labeller's box in a real browser: clicks, keys, and a kernel killed between."""

import importlib.util
import os
import shutil
import signal

import nbformat
import pytest

from tests.browser import jupyter_lab, page_at
from tests.conftest import ROOT
from utils.preferences import read_pairs

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
NEEDED = {
    "Chromium": CHROMIUM,
    "JupyterLab": importlib.util.find_spec("jupyterlab"),
    "websocket-client": importlib.util.find_spec("websocket"),
}
MISSING = [name for name, found in NEEDED.items() if not found]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}"),
]
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


def test_forty_pairs_by_clicks_and_keys_and_a_kernel_killed(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, tmp_path / "label.ipynb")
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path / "home")}
    ours = tmp_path / "mine.jsonl", tmp_path / "mine.again.jsonl"

    with (
        jupyter_lab(tmp_path, environ) as lab,
        page_at(CHROMIUM, f"{lab}/lab/tree/label.ipynb", tmp_path / "profile") as page,
    ):

        def run_the_cell():
            kernel = "window.jupyterapp.shell.currentWidget.sessionContext.session"
            page.until(f"{kernel}.kernel.status == 'idle'")
            page.run("window.jupyterapp.commands.execute('notebook:run-all-cells')")

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
        session = "window.jupyterapp.shell.currentWidget.sessionContext.session"
        page.until(
            f"['autorestarting','restarting'].includes({session}.kernel.status)"
            f" || document.querySelector('.jp-Dialog')"
        )
        page.run("document.querySelector('.jp-Dialog .jp-mod-accept')?.click()")
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
