"""Who may import whom: the contracts of .importlinter, and that each can fail."""

import re
import shutil

import pytest

from tests.conftest import ROOT, code_cells, python
from utils.runs import NOTEBOOKS

LINT = "from importlinter.cli import lint_imports_command as lint; lint()"
BROKEN = [  # a file, what is written into it, and how the contract's name begins
    ("utils/runs.py", "from workshop import tiny", "Each room"),
    ("utils/plots.py", "import more.common", "Each room"),
    ("utils/data.py", "from practice import exact_world", "Each room"),
    ("more/lora.py", "import workshop.tiny", "Each room"),
    ("practice/tiny_world.py", "import practice.exact_world", "The leaves"),
    ("practice/own_data.py", "from utils import settings", "The leaves"),
    ("utils/training.py", "def late():\n    from utils import data", "The files"),
    ("utils/new.py", "", "The files"),
    ("utils/ppo.py", "import transformers", "The mathematics"),
    ("utils/settings.py", "import torch", "Settings"),
    ("practice/exact_world.py", "import practice.exact_gradients", "No circles"),
]


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A copy of the house, to build badly in."""
    folder = tmp_path_factory.mktemp("house")
    only_code = shutil.ignore_patterns("*.ipynb", "*.json", "__pycache__")
    for room in ("utils", "practice", "more", "exercises", "workshop"):
        shutil.copytree(ROOT / room, folder / room, ignore=only_code)
    shutil.copy(ROOT / ".importlinter", folder)
    return folder


def lint(folder):
    """Whether all is in order in this folder, and what `lint-imports` says."""
    how = {"cwd": folder, "COLUMNS": "200", "NO_COLOR": "1"}
    done = python("-c", LINT, "--no-cache", "--no-logo", **how)
    return done.returncode == 0, done.stdout + done.stderr


def test_the_contracts_are_kept(house):
    kept, said = lint(house)
    assert kept and " 0 broken" in said, said


@pytest.mark.parametrize("name, line, contract", BROKEN)
def test_what_breaks_a_contract_is_named(house, name, line, contract):
    file = house / name
    before = file.read_text("utf8") if file.exists() else ""
    file.write_text(f"{before}\n{line}\n", "utf8")
    kept, said = lint(house)
    file.write_text(before, "utf8") if before else file.unlink()
    assert not kept and re.search(f"{contract}.* BROKEN", said), said
    assert file.stem in said.split("Broken contracts")[-1], said


@pytest.mark.parametrize("number", "123")
def test_the_series_knows_nothing_of_what_stands_above_it(number):
    """Neither a lesson further on, nor a measurement, nor several processes."""
    above = r"(from|import) (more|exercises|workshop)\b"
    above += r"|\b(more|workshop)[./]\w|accelerate|\bprocess|\branks?\b"
    for id, cell in code_cells(NOTEBOOKS[number]).items():
        assert not re.search(above, cell.source), id
