"""Who may import whom: the contracts of .importlinter, and that they can fail."""

import ast
import graphlib
import os
import shutil
import subprocess
import sys

import grimp
import pytest

from utils.support.notebook import ROOT

PACKAGES = ("utils", "tools", "benchmarks", "exercises")
LINT = "from importlinter.cli import lint_imports_command as lint; lint()"

# What these files may import beside the standard library
IMPORTS = {
    "ppo": {"torch"},
    "fast": {"torch", "utils.ppo"},
    "estimators": {"torch", "utils.ppo"},
    "settings": set(),
    "processes": {"accelerate", "torch"},
    "training": {"torch", "utils", "utils.processes", "utils.settings"},
    "inputs": {"torch", "datasets", "huggingface_hub", "tqdm"},
}


def lint(folder):
    """Status and words of `lint-imports` in this folder."""
    done = subprocess.run(
        [sys.executable, "-c", LINT, "--no-cache", "--no-logo"],
        cwd=folder,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def test_the_contracts_are_kept():
    code, said = lint(ROOT)
    assert code == 0 and " 0 broken" in said, said


@pytest.fixture(scope="module")
def imports():
    """For each module what it imports: modules of ours, and names of libraries."""
    graph = grimp.build_graph(*PACKAGES, include_external_packages=True, cache_dir=None)
    return {m: graph.find_modules_directly_imported_by(m) for m in graph.modules}


def test_no_modules_import_each_other_in_a_circle(imports):
    assert "utils.ppo" in imports["utils.fast"]
    list(graphlib.TopologicalSorter(imports).static_order())  # a circle raises


@pytest.mark.parametrize("name", IMPORTS)
def test_the_lowest_files_import_nothing_but_what_is_listed(name, imports):
    found = imports[f"utils.{name}"] - sys.stdlib_module_names
    assert found == IMPORTS[name]


def test_the_mathematics_of_ppo_imports_torch_and_nothing_else():
    """Said of the text itself: no import is hidden from the graph."""
    tree = ast.parse((ROOT / "utils/ppo.py").read_text("utf8"))
    lines = [ast.unparse(node) for node in ast.walk(tree) if hasattr(node, "names")]
    assert sorted(lines) == ["from torch import Tensor", "import torch"]


@pytest.fixture
def house(tmp_path):
    """A copy of the house, to build badly in."""
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            copy = tmp_path / file.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)
    shutil.copy(ROOT / ".importlinter", tmp_path)
    return tmp_path


STOREYS = "Workshop over practice over the files directly in utils"


@pytest.mark.parametrize(
    "file, line, contract, said",
    [
        (
            "utils/models.py",
            "from utils.support.notebook import ROOT",
            STOREYS,
            "utils.models is not allowed to import utils.support",
        ),
        (
            "utils/practice/tiny_world.py",
            "import utils.support.artefacts",
            STOREYS,
            "utils.practice is not allowed to import utils.support",
        ),
        (
            "utils/plots.py",
            "from utils.practice import exact_world",
            STOREYS,
            "utils.plots is not allowed to import utils.practice",
        ),
        (
            "utils/inputs.py",
            "def late():\n    from utils import settings",
            STOREYS,
            "utils.inputs is not allowed to import utils.settings",
        ),
        ("utils/new.py", "", STOREYS, "utils.new"),
        (
            "utils/support/run.py",
            "from tools import pictures",
            "The library knows nothing of tools, benchmarks and exercises",
            "utils is not allowed to import tools",
        ),
        (
            "utils/fast.py",
            "import transformers",
            "The mathematics of PPO knows tensors only",
            "utils.fast is not allowed to import transformers",
        ),
        (
            "utils/settings.py",
            "import torch",
            "Settings need no library",
            "utils.settings is not allowed to import torch",
        ),
        (
            "utils/data.py",
            "import utils.models\nimport utils.evaluation",
            "No circles of imports",
            "No cycles are allowed in utils",
        ),
    ],
)
def test_what_breaks_a_contract_is_named(house, file, line, contract, said):
    with (house / file).open("a") as stream:
        stream.write(f"\n{line}\n")
    code, output = lint(house)
    assert code == 1
    assert f"{contract} BROKEN" in output, output
    assert said in output, output


def test_the_copy_is_in_order_before_it_is_broken(house):
    code, said = lint(house)
    assert code == 0, said
