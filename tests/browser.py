"""A browser to test with: Chromium without a window, over the DevTools protocol."""

import base64
import json
import re
import socket
import subprocess
import sys
from contextlib import contextmanager

LOOK = """new Promise((found, failed) => {{
    const look = () => {{
        let value;
        try {{ value = {0} }} catch (error) {{ value = null }}
        if (value) {{ clearInterval(timer); found(value) }}
    }};
    const timer = setInterval(look, 20);
    setTimeout(() => {{ clearInterval(timer); failed({1}) }}, {2});
    look();
}})"""
WAIT = 180  # seconds, for a machine that does other things too


@contextmanager
def process(command, **options):
    """A process that says where it listens, on stderr; it ends with the context."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stderr=pipe, text=True, **options) as running:
        try:
            yield running
        finally:
            running.kill()


def line_of(running, pattern):
    """The first group of the first line of its stderr in which the pattern is found."""
    for line in running.stderr:
        if found := re.search(pattern, line):
            return found[1]
    raise RuntimeError(f"{running.args[0]} ended before it said {pattern!r}")


class Page:
    """A page of the browser, that is clicked and typed on as by a person."""

    def __init__(self, socket):
        self.socket, self.number = socket, 0

    def call(self, method, **parameters):
        """What the browser answers to a command of the DevTools protocol."""
        self.number += 1
        command = {"id": self.number, "method": method, "params": parameters}
        self.socket.send(json.dumps(command))
        while (answer := json.loads(self.socket.recv())).get("id") != self.number:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def run(self, script):
        """The value of an expression of JavaScript; a promise is waited for."""
        options = {"awaitPromise": True, "returnByValue": True}
        found = self.call("Runtime.evaluate", expression=script, **options)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, condition):
        """The value of the expression, as soon as it is true in the page."""
        script = LOOK.format(condition, json.dumps(f"never: {condition}"), 1000 * WAIT)
        while True:
            try:
                return self.run(script)
            except RuntimeError as error:  # a page that is left takes its scripts along
                if "context was destroyed" not in str(error):
                    raise

    def click(self, element):
        """Press the mouse in the middle of the element that an expression gives."""
        x, y = self.until(
            f"""(() => {{
                const it = {element};
                it.scrollIntoView({{block: "center"}});
                const box = it.getBoundingClientRect();
                return box.width && [box.x + box.width / 2, box.y + box.height / 2];
            }})()"""
        )
        mouse = {"x": x, "y": y, "button": "left", "clickCount": 1}
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, **mouse)

    def key(self, letter):
        """Press a key."""
        self.call("Input.dispatchKeyEvent", type="keyDown", text=letter, key=letter)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=letter)

    def picture(self, path):
        """A screenshot, as PNG."""
        path.write_bytes(
            base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        )


@contextmanager
def page_at(chromium, address, profile):
    """A page of this Chromium that has opened the address."""
    from websocket import create_connection

    command = [chromium, "--headless=new", "--no-sandbox", "--disable-gpu"]
    command += ["--remote-debugging-port=0", "--remote-allow-origins=*"]
    command += [f"--user-data-dir={profile}", "--window-size=1100,900"]
    with process([*command, "about:blank"]) as browser:
        root = line_of(browser, r"listening on (ws://\S+)")
        socket = create_connection(root, timeout=WAIT + 20)
        one = Page(socket).call("Target.createTarget", url=address)["targetId"]
        socket.close()
        host = re.match(r"ws://[^/]+", root)[0]
        socket = create_connection(f"{host}/devtools/page/{one}", timeout=WAIT + 20)
        try:
            yield Page(socket)
        finally:
            socket.close()


@contextmanager
def jupyter_lab(folder, environ):
    """The address of a JupyterLab that serves this folder to this machine only."""
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += ["--port=0", "--ip=127.0.0.1", "--expose-app-in-browser"]
    command += ["--IdentityProvider.token=", "--ServerApp.password="]
    command += [f"--ServerApp.root_dir={folder}", "--LabApp.news_url=None"]
    never = "jupyterlab.NeverCheckForUpdate"
    command += [f"--LabApp.check_for_updates_class={never}"]
    with process(command, cwd=folder, env=environ) as server:
        yield line_of(server, r"(http://127\.0\.0\.1:\d+)/lab")


@contextmanager
def classic_notebook(folder, environ):
    """The address of a classic notebook server, likewise: `notebook` before 7."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "notebook", "--no-browser", "--allow-root"]
    command += [f"--port={port}", "--ip=127.0.0.1", f"--notebook-dir={folder}"]
    command += ["--NotebookApp.token=", "--NotebookApp.password="]
    with process(command, cwd=folder, env=environ) as server:
        yield line_of(server, r"(http://127\.0\.0\.1:\d+)/")
