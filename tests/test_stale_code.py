"""A file of `utils` that is edited under a running kernel: said before it matters."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from utils.support.fingerprint import fingerprints_of_code

pytestmark = pytest.mark.faults

# In a process of its own, in a copy of the project: import all, edit, try to go on
EDIT = """
import importlib
from pathlib import Path

files = [p for p in sorted(Path("utils").rglob("*.py")) if p.name != "__main__.py"]
for file in files:
    name = ".".join(file.with_suffix("").parts)
    importlib.import_module(name.removesuffix(".__init__"))

import torch
from utils.ppo import compute_gae
from utils.settings import TINY
from utils.support.notebook import show_source
from utils.support.preflight import prepare
from utils.training import GuardedOptimizer

model = torch.nn.Linear(1, 1)
adam = torch.optim.AdamW(model.parameters())
optimizer = GuardedOptimizer(model, adam, TINY)
ways = {
    "a settings cell": lambda: prepare(TINY, "sft"),
    "a training cell": lambda: GuardedOptimizer(model, adam, TINY),
    "the loop": optimizer.resume,
    "a source shown": lambda: show_source(compute_gae),
}
for way in ("the loop", "a source shown"):
    ways[way]()  # nothing was edited yet
for file in files:
    text = file.read_text("utf8")
    file.write_text(text + "\\n# edited\\n", "utf8")
    for way, go in ways.items():
        try:
            go()
            print(file.as_posix(), way, "not noticed", sep="|")
        except RuntimeError as error:
            print(file.as_posix(), way, error, sep="|")
    file.write_text(text, "utf8")
optimizer.resume()  # as it was imported
"""


def test_each_file_edited_under_a_live_kernel_is_named(tmp_path, survived):
    shutil.copytree(ROOT / "utils", tmp_path / "utils")
    done = subprocess.run(
        [sys.executable, "-c", EDIT], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split("|") for line in done.stdout.splitlines()]
    files = {p.relative_to(ROOT).as_posix() for p in (ROOT / "utils").rglob("*.py")}
    assert {file for file, _, _ in lines} == files - {"utils/__main__.py"}
    assert len(lines) == 4 * (len(files) - 1)
    for file, way, said in lines:
        assert said == (
            f"{file} changed after this kernel had imported the old version, which "
            "would run on; restart the kernel, and run the cells again"
        ), way
    survived(f"each of {len(files) - 1} files of utils edited", lines[0][2])


def base(x):
    return helper(x) + RATE


def helper(x):
    return x * 2


RATE = 0.5


def test_a_fingerprint_follows_what_is_called_and_read(monkeypatch):
    """A called function, a number that is read, a default; not a docstring."""
    before = fingerprints_of_code(base)
    assert set(before) == {"base", "helper", "RATE"}
    assert fingerprints_of_code(base) == before
    module = sys.modules[__name__]
    monkeypatch.setattr(module, "RATE", 0.25)
    after = fingerprints_of_code(base)
    assert after["RATE"] != before["RATE"] and after["helper"] == before["helper"]
    monkeypatch.setattr(module, "RATE", 0.5)
    monkeypatch.setattr(helper, "__doc__", "says something else")
    assert fingerprints_of_code(base) == before
    monkeypatch.setattr(module, "helper", lambda x: x * 3)
    after = fingerprints_of_code(base)
    assert after["helper"] != before["helper"] and after["base"] == before["base"]
    monkeypatch.setattr(base, "__defaults__", (1,))
    assert "default of base[0][0]" in fingerprints_of_code(base)


SAME = """
import sys
sys.path.insert(0, {root!r})
from utils.support.fingerprint import fingerprints_of_code
from utils.support.notebook import import_cells

def among(x, also=print, loss=lambda x: x):
    return x in {{"a", "b", "c", "d", "e"}}

cells = ("fresh-run", "collect-rollout", "ppo-advantages", "ppo-loss", "ppo-update")
loop = import_cells("3-RLHF.ipynb", *cells, "summarise", "train")
code = [loop[name] for name in ("fresh_run", "train", "ppo_advantages", "ppo_update")]
print(sorted(fingerprints_of_code(among, *code).items()))
"""


def test_another_process_finds_the_same_fingerprints():
    """Whatever order its sets have, and wherever its functions lie in memory."""
    found = set()
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", SAME.format(root=str(ROOT))],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        found.add(done.stdout)
    assert len(found) == 1 and "'among'" in found.pop()
