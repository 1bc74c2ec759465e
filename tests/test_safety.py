"""What the code of the project may not do, in any file and any notebook cell."""

import ast
import re
import subprocess
import symtable

import nbformat
import pytest

from tests.conftest import ROOT
from utils.support.artefacts import STAGES
from utils.support.notebook import NOTEBOOKS, SERIES

pytestmark = pytest.mark.faults
FOLDERS = ("utils", "tests", "tools", "benchmarks", "exercises", "more")


def sources():
    """Name and text of every Python file and every code cell."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield str(path.relative_to(ROOT)), path.read_text("utf8")
        for path in sorted((ROOT / folder).rglob("*.ipynb")):
            yield from cells_of(path)
    for name in SERIES:
        yield from cells_of(ROOT / NOTEBOOKS[name])


def cells_of(path):
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            yield f"{path.relative_to(ROOT)}#{cell.id}", cell.source


def forbidden(source):
    """The calls that would run what a file contains, or trust a stranger."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called, options = (
            ast.unparse(node.func),
            {k.arg: k.value for k in node.keywords},
        )
        weights_only = ast.unparse(options.get("weights_only", ast.Constant(None)))
        if called == "torch.load" and weights_only != "True":
            yield ast.unparse(node)
        if re.fullmatch(r"(c?pickle|dill|joblib|shelve)\.(load|loads|open)", called):
            yield ast.unparse(node)
        if "trust_remote_code" in options:
            yield ast.unparse(node)
        if called.endswith("from_pretrained") and (
            ast.unparse(options.get("use_safetensors", ast.Constant(True))) != "True"
        ):
            yield ast.unparse(node)


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "pickle.load(file)",
        "load_dataset(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(name, use_safetensors=False)",
    ],
)
def test_what_is_forbidden_would_be_seen(source):
    assert list(forbidden(f"x = 1\nif x:\n    y = {source}")) == [source]


def test_nothing_is_unpickled_and_no_strangers_code_runs():
    found = {name: list(forbidden(source)) for name, source in sources()}
    found.pop("tests/test_safety.py")
    assert len(found) > 100 and not [calls for calls in found.values() if calls]


def test_our_own_loaders_ask_for_safetensors():
    text = (ROOT / "utils" / "models.py").read_text("utf8")
    calls = re.findall(r"Auto\w+\.from_pretrained\([^)]*\)", text)
    models = [call for call in calls if "AutoConfig" not in call]
    assert len(models) == 2 and all("use_safetensors=True" in call for call in models)


def test_no_token_and_no_path_of_a_home_is_committed():
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split("\0")
    if names == [""]:  # an unpacked archive
        names = [str(p.relative_to(ROOT)) for p in ROOT.glob("*.ipynb")]
    for name in filter(None, names):
        path = ROOT / name
        if path.suffix in {".ipynb", ".json", ".md", ".py", ".txt"} and path.exists():
            text = path.read_text("utf8")
            assert not re.search(r"hf_[A-Za-z0-9]{30,}", text), name
            assert not re.search(r"(?<![\w.:/])/(home|root|Users)/\w", text), name


def test_the_order_of_cells_does_not_matter():
    """No name that one cell takes from another is set in two cells.

    Else the second would change what the first has made, and whoever runs the first
    once more, or jumps back, would go on with another model, mask or generator.
    """
    for name in NOTEBOOKS.values():
        cells = dict(cells_of(ROOT / name))
        sets = {cell: names_set(source) for cell, source in cells.items()}
        reads = {cell: names_read(source) for cell, source in cells.items()}
        taken = set().union(*(reads[cell] - sets[cell] for cell in cells))
        twice = {
            name: setters
            for name in taken
            if len(setters := [cell for cell in cells if name in sets[cell]]) > 1
        }
        assert twice == {}


def names_set(source):
    """The names that a cell leaves behind, imported ones aside."""
    table = symtable.symtable(source, "cell", "exec")
    return {s.get_name() for s in table.get_symbols() if s.is_assigned()}


def names_read(source):
    def walk(table):
        yield from (s.get_name() for s in table.get_symbols() if s.is_referenced())
        for child in table.get_children():
            own = {s.get_name() for s in child.get_symbols() if s.is_local()}
            yield from set(walk(child)) - own

    return set(walk(symtable.symtable(source, "cell", "exec")))


def test_each_notebook_names_its_own_artefact():
    for name, artefact in zip(SERIES, STAGES, strict=True):
        cells = cells_of(ROOT / NOTEBOOKS[name])
        (settings,) = (s for cell, s in cells if cell.endswith("#settings"))
        assert f'prepare("{artefact}", PRESET, CHANGES)' in settings
