"""What the code of the project may not do: who imports whom, and what is trusted."""

import re
import symtable

import pytest

from tests.conftest import ROOT, code_cells, python
from utils.runs import NOTEBOOKS

ROOMS = ("utils", "practice", "more", "workshop", "exercises")


def test_the_contracts_are_kept():
    lint = "from importlinter.cli import lint_imports_command as lint; lint()"
    done = python("-c", lint, "--no-cache", NO_COLOR="1")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("number", "123")
def test_the_series_knows_nothing_of_what_stands_above_it(number):
    """Neither a lesson further on, nor a measurement, nor several processes."""
    above = r"(from|import) (more|exercises|workshop)\b"
    above += r"|\b(more|workshop)[./]\w|accelerate|\bprocess|\branks?\b"
    for id, cell in code_cells(NOTEBOOKS[number]).items():
        assert not re.search(above, cell.source), id


def sources():
    """Name and text of every Python file and every code cell."""
    for path in [x for room in ROOMS for x in (ROOT / room).rglob("*.py")]:
        yield path.relative_to(ROOT).as_posix(), path.read_text("utf8")
    rooms = [ROOT / "exercises" / "source", ROOT / "more", ROOT]
    for path in [x for room in rooms for x in room.glob("*.ipynb")]:
        for id, cell in code_cells(path).items():
            yield f"{path.name}#{id}", cell.source


TRUSTING = r"torch\.load\((?!.*weights_only=True)|\b(pickle|dill|joblib)\.load"
TRUSTING += r"|use_safetensors=False|trust_remote_code="


def test_nothing_is_unpickled_and_no_strangers_code_runs():
    found = {name: re.findall(TRUSTING, source) for name, source in sources()}
    assert len(found) > 100 and {"utils/runs.py", "3-RLHF.ipynb#train"} < found.keys()
    assert not {name: calls for name, calls in found.items() if calls}


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
