"""What the code of the project may not do, in any file and any notebook cell."""

import ast
import re
import shutil
import subprocess
import symtable

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT, code_cells
from utils.models import RewardModel, load_causal_lm
from utils.runs import NOTEBOOKS

pytestmark = pytest.mark.faults
ROOMS = ("utils", "practice", "more", "exercises", "workshop", "tests")


def sources():
    """Name and text of every Python file and every code cell."""
    for place in (*(ROOT / room for room in ROOMS), *ROOT.glob("*.ipynb")):
        for path in (place, *place.rglob("*.*")):
            name = path.relative_to(ROOT).as_posix()
            if path.suffix == ".py":
                yield name, path.read_text("utf8")
            elif path.suffix == ".ipynb":
                yield from (
                    (f"{name}#{i}", c.source) for i, c in code_cells(path).items()
                )


def forbidden(source):
    """The calls that would run what a file contains, or trust a stranger."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            call, called = ast.unparse(node), ast.unparse(node.func)
            options = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if (
                (called == "torch.load" and options.get("weights_only") != "True")
                or re.match(r"(c?pickle|dill|joblib|shelve)\.(load|loads|open)\(", call)
                or options.get("use_safetensors", "True") != "True"
                or "trust_remote_code" in options
            ):
                yield call


def test_what_is_forbidden_would_be_seen():
    for source in (
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "pickle.load(file)",
        "load_dataset(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(name, use_safetensors=False)",
    ):
        assert list(forbidden(f"x = 1\nif x:\n    y = {source}")) == [source]


def test_nothing_is_unpickled_and_no_strangers_code_runs():
    found = {name: list(forbidden(source)) for name, source in sources()}
    assert len(found) > 100 and {"utils/runs.py", "3-RLHF.ipynb#train"} < found.keys()
    assert not {name: calls for name, calls in found.items() if calls}


@pytest.mark.parametrize("load", [load_causal_lm, RewardModel.from_pretrained])
def test_weights_that_would_be_unpickled_are_not_read(load, world, tmp_path):
    folder = shutil.copytree(world / "model", tmp_path / "model")
    assert load(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        load(folder)


def test_no_token_and_no_path_of_a_home_is_committed():
    command = ["git", "-C", str(ROOT), "ls-files", "-z"]
    done = subprocess.run(command, capture_output=True, text=True)
    names = [ROOT / name for name in done.stdout.split("\0") if name]
    for path in names or ROOT.glob("*.ipynb"):  # in an unpacked archive
        if path.suffix in {".ipynb", ".json", ".md", ".py", ".txt"} and path.exists():
            text = path.read_text("utf8")
            assert not re.search(r"hf_[A-Za-z0-9]{30,}", text), path
            assert not re.search(r"(?<![\w.:/])/(home|root|Users)/\w", text), path


def names_read(table):  # from elsewhere, by a cell or by a function in it
    yield from (s.get_name() for s in table.get_symbols() if s.is_referenced())
    for child in table.get_children():
        own = {s.get_name() for s in child.get_symbols() if s.is_local()}
        yield from set(names_read(child)) - own


@pytest.mark.parametrize("name", NOTEBOOKS.values())
def test_the_order_of_cells_does_not_matter(name):
    """No name that one cell takes from another is set in two cells.

    Else the second would change what the first has made, and whoever runs the first
    once more, or jumps back, would go on with another model, mask or generator. (The
    first cell holds what is chosen; the second may choose for another preset.)
    """
    taken, set_by = set(), []
    for id, cell in code_cells(name).items():
        if id != "parameters":
            table = symtable.symtable(cell.source, id, "exec")
            sets = {s.get_name() for s in table.get_symbols() if s.is_assigned()}
            taken |= set(names_read(table)) - sets
            set_by += sets
    assert not {name for name in taken if set_by.count(name) > 1}
