"""A file of `utils` that is edited under a running kernel: said before it matters."""

import functools
import os
import shutil
import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT
from utils.support.fingerprint import fingerprint, fingerprints_of_code

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
    "a settings cell": lambda: prepare("sft", "tiny"),
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


RATE, TABLE = 0.5, {"a": [1, 2]}


class Scorer:
    offset = 1.0

    def score(self, x):
        return x + self.offset


def helper(x):
    """Says something."""
    return x * 2


def base(x, factor=3):
    return helper(x) * factor + RATE + TABLE["a"][0] + Scorer().score(x)


def same_but(monkeypatch, place, name, value):
    """The names of the fingerprints that this changes."""
    before = fingerprints_of_code(base)
    with monkeypatch.context() as patch:
        patch.setattr(place, name, value)
        after = fingerprints_of_code(base)
    assert fingerprints_of_code(base) == before
    return {n for n in before if after.get(n) != before[n]}


def decorated(function):
    return functools.wraps(function)(lambda x: function(x) + 1)


def commented(x):
    """Says something else."""
    # and more
    return x * 2


def test_a_fingerprint_follows_what_is_called_and_read(monkeypatch):
    """Functions, numbers, tables, defaults, methods, decorators; not what they say."""
    module = sys.modules[__name__]
    assert set(fingerprints_of_code(base)) == {
        *("base", "helper", "RATE", "TABLE", "Scorer")
    }
    changed = functools.partial(same_but, monkeypatch)
    assert changed(module, "RATE", 0.25) == {"RATE"}
    assert changed(module, "TABLE", {"a": [2, 1]}) == {"TABLE"}
    assert changed(module, "helper", lambda x: x * 3) == {"helper"}
    assert changed(module, "helper", decorated(helper)) == {"helper"}
    assert changed(module, "helper", torch.no_grad()(helper)) == {"helper"}
    assert changed(base, "__defaults__", (4,)) == {"base"}
    assert changed(Scorer, "offset", 2.0) == {"Scorer"}
    assert changed(Scorer, "score", lambda self, x: x) == {"Scorer"}
    assert changed(module, "helper", commented) == set()


def test_whatever_is_called_has_a_fingerprint(monkeypatch):
    """A method, a partial function, an object that can be called; and other weights."""
    makers = (lambda: Scorer().score, lambda: functools.partial(helper, 2), Callable)
    for make in makers:
        before = fingerprints_of_code(make())
        with monkeypatch.context() as patch:
            patch.setattr(Scorer, "score", lambda self, x: 0)
            patch.setattr(Callable, "__call__", lambda self, x: 0)
            patch.setattr(helper, "__code__", (lambda x: 0).__code__)
            assert fingerprints_of_code(make()) != before != {}
    model = torch.nn.Linear(2, 1)
    for kind in (torch.float32, torch.bfloat16, torch.float16):
        model = model.to(kind)
        before = fingerprint(model)
        model.weight.data = model.weight.data.flip(1)
        assert fingerprint(model) != before


class Callable:
    def __call__(self, x):
        return Scorer().score(x)


SAME = """
import sys
sys.path.insert(0, {root!r})
from utils.support.fingerprint import fingerprints_of_code
from utils.support.notebook import LOOP, import_cells

def among(x, also=print, loss=lambda x: x):
    return x in {{"a", "b", "c", "d", "e"}}

loop = import_cells("3-RLHF.ipynb", *LOOP)
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
