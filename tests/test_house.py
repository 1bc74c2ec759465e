"""What the code of the project may not do: who imports whom, and what is trusted."""

import re
import symtable

import pytest

from tests.conftest import ROOT, code_cells, python
from utils.settings import NOTEBOOKS

ROOMS = ("utils", "practice", "more", "workshop", "exercises")


def test_the_contracts_are_kept():
    lint = "from importlinter.cli import lint_imports_command as lint; lint()"
    done = python("-c", lint, "--no-cache", NO_COLOR="1")
    assert done.returncode == 0, done.stdout + done.stderr
    for number in "123":  # the series knows nothing of what stands above it
        code = "\n".join(cell.source for cell in code_cells(NOTEBOOKS[number]).values())
        assert not re.search(r"\b(from|import) (more|exercises|workshop)\b", code)


TRUSTING = r"torch\.load\((?!.*weights_only=True)|\b(pickle|dill|joblib)\.load"
TRUSTING += r"|use_safetensors=False|trust_remote_code="


def test_nothing_is_unpickled_and_no_strangers_code_runs():
    rooms = ["*.ipynb", "more/*.ipynb", "exercises/source/**/*.ipynb"]
    rooms += [f"{room}/**/*.py" for room in ROOMS]
    texts = {x: x.read_text("utf8") for room in rooms for x in ROOT.glob(room)}
    assert {ROOT / "utils/runs.py", ROOT / NOTEBOOKS["3"]} <= texts.keys()
    assert not {name for name, text in texts.items() if re.search(TRUSTING, text)}


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
