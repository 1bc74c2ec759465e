"""The labeller's box in JupyterLab: clicks, keys, and a kernel killed between.

In Chromium without a window, over the DevTools protocol.
"""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import nbformat
import pytest

from more.preferences import read_pairs
from tests.conftest import ROOT

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
MODULES = all(map(importlib.util.find_spec, ("jupyterlab", "websocket")))
CELL = """
import os
from pathlib import Path
from more.labelling import Labeller, labelling_box, make_questions

Path("kernel.txt").write_text(str(os.getpid()))
pairs = [("the film is", f" fine <b>{i}</b>.", f" dull {i} & slow") for i in range(36)]
labelling_box(Labeller(make_questions(pairs, seed=1), "mine.jsonl"))
"""
LOOK = """new Promise(found => {{
    const look = () => {{
        let value;
        try {{ value = {} }} catch (error) {{ value = null }}
        value ? found(value) : setTimeout(look, 20);
    }};
    look();
}})"""
PLACE = """(() => {{
    {0}.scrollIntoView({{block: "center"}});
    const box = {0}.getBoundingClientRect();
    return box.width && [box.x + box.width / 2, box.y + box.height / 2];
}})()"""
KERNEL = "window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.status"
RUN_ALL = "window.jupyterapp.commands.execute('notebook:run-all-cells')"
DIALOG = "document.querySelector('.jp-Dialog .jp-mod-accept')"
STATUS = "[...document.querySelectorAll('.widget-html')].map(x => x.innerText).join()"
BUTTONS = "[...document.querySelectorAll('.widget-button')]"
LAB = "--no-browser --allow-root --port=0 --ip=127.0.0.1 --expose-app-in-browser "
LAB += "--IdentityProvider.token= --ServerApp.password= --LabApp.news_url=None "
LAB += "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"
WINDOW = "--headless=new --no-sandbox --disable-gpu --window-size=1100,900 "
WINDOW += "--remote-debugging-port=0 --remote-allow-origins=* about:blank"


@contextlib.contextmanager
def process(command, pattern, **options):
    """What a process says on stderr, where the pattern finds it; it ends with this."""
    options |= {"stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **options) as running:
        try:
            said = (re.search(pattern, line) for line in running.stderr)
            yield next(filter(None, said))[1]
        finally:
            running.kill()


class Page:
    def __init__(self, browser, address):
        from websocket import create_connection

        self.number, self.socket = 0, create_connection(browser, timeout=200)
        one = self.call("Target.createTarget", url=address)["targetId"]
        host = re.match(r"ws://[^/]+", browser)[0]
        self.socket = create_connection(f"{host}/devtools/page/{one}", timeout=200)

    def call(self, method, **parameters):
        self.number += 1
        command = {"id": self.number, "method": method, "params": parameters}
        self.socket.send(json.dumps(command))
        while (answer := json.loads(self.socket.recv())).get("id") != self.number:
            pass
        return answer.get("result")  # a page that is left gives none

    def until(self, condition):
        options = {"awaitPromise": True, "returnByValue": True}
        script = LOOK.format(condition)
        while not (
            found := self.call("Runtime.evaluate", expression=script, **options)
        ):
            pass
        return found["result"]["value"]

    def sees(self, words):
        self.until(f"{STATUS}.includes({words!r})")

    def run_all(self):
        self.until(f"{KERNEL} == 'idle'")
        self.call("Runtime.evaluate", expression=RUN_ALL)

    def click(self, element):
        x, y = self.until(PLACE.format(element))
        mouse = {"x": x, "y": y, "button": "left", "clickCount": 1}
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, **mouse)

    def answer(self, key, number, words):
        """The same by a click or a key, in turn; it counts when the box says so."""
        if number % 2:
            self.click(f"{BUTTONS}.find(x => x.innerText.startsWith('{key}:'))")
        else:
            self.click("document.querySelector('.widget-text input')")
            self.call("Input.dispatchKeyEvent", type="keyDown", text=key, key=key)
            self.call("Input.dispatchKeyEvent", type="keyUp", key=key)
        self.sees(words)


@pytest.mark.slow
@pytest.mark.skipif(not (CHROMIUM and MODULES), reason="no Chromium or JupyterLab here")
def test_forty_pairs_by_clicks_and_keys_and_a_kernel_killed(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, tmp_path / "label.ipynb")
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path / "home")}
    ours = tmp_path / "mine.jsonl", tmp_path / "mine.again.jsonl"
    lab = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={tmp_path}"]
    window = [CHROMIUM, f"--user-data-dir={tmp_path / 'me'}", *WINDOW.split()]
    with (
        process(lab + LAB.split(), r"(http://\S+:\d+)/lab", env=environ) as server,
        process(window, r"listening on (ws://\S+)") as browser,
    ):
        page = Page(browser, f"{server}/lab/tree/label.ipynb")
        page.run_all()
        page.sees("0 of 40")
        for number in range(20):
            page.answer("12"[number % 3 == 0], number, f"{number + 1} of 40")
        before = [path.read_bytes() for path in ours]
        assert sum(data.count(b"\n") for data in before) == 20
        os.kill(int((tmp_path / "kernel.txt").read_text()), signal.SIGKILL)
        page.until(f"{KERNEL}.endsWith('restarting') || {DIALOG}")
        page.call("Runtime.evaluate", expression=f"{DIALOG}?.click()")
        page.run_all()
        page.sees("20 of 40")
        assert [path.read_bytes() for path in ours] == before
        page.answer("s", 20, "1 skipped")
        page.answer("u", 21, "0 skipped")
        for number in range(20, 40):
            page.answer("1", number, f"{number + 1} of 40")
        page.sees("All questions are answered")
    (pairs, faults), (again, more) = map(read_pairs, ours)
    assert (len(pairs), len(again), faults, more) == (36, 4, [], [])
    assert not (tmp_path / "mine.skipped.jsonl").read_text()
