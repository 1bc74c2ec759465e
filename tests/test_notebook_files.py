"""The rules for the notebook files, as they are committed."""

import ast
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbconvert import HTMLExporter

from tests.test_classroom import recipes_of_notebook_3
from tools.real_run import mean
from utils.evaluation import FIGURES
from utils.support.notebook import NOTEBOOKS, ROOT, SERIES, import_cells
from utils.support.run import EARLIER_FIGURES

WHEN = ("before", "after")
REAL_RUN = [f"docs/real-run/{NOTEBOOKS[number]}" for number in SERIES]


@pytest.fixture(params=NOTEBOOKS.values())
def notebook(request):
    return nbformat.read(ROOT / request.param, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_it_is_valid_and_has_no_widgets(notebook):
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert "widgets" not in notebook.metadata
    assert "widget-view" not in json.dumps(notebook)


def test_cells_are_short(notebook):
    lengths = [len(cell.source.splitlines()) for cell in code(notebook)]
    assert statistics.median(lengths) <= 10
    assert max(lengths) <= 40
    widest = max(
        (line for c in code(notebook) for line in c.source.split("\n")), key=len
    )
    assert len(widest) <= 88, widest


def test_the_outputs_are_those_of_a_tiny_run_and_say_so(notebook):
    assert "a run of the `tiny` preset" in notebook.cells[0].source
    for cell in code(notebook):
        if cell.id == "settings":
            printed = "".join(output.get("text", "") for output in cell.outputs)
            assert "preset: tiny" in printed
    counts = [cell.execution_count for cell in code(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    assert all(output.output_type != "error" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("name", REAL_RUN)
def test_the_notebooks_of_the_real_run_are_whole_and_of_a_real_model(name):
    notebook = nbformat.read(ROOT / name, as_version=4)
    nbformat.validate(notebook)
    assert "widget-view" not in json.dumps(notebook)
    cells = {cell.id: cell for cell in notebook.cells}
    assert cells["title"].source.splitlines()[4].startswith("*A real model's run, by")
    assert "preset: full" in cells["settings"].outputs[0].text
    assert "data set: stanfordnlp/sst2" in cells["settings"].outputs[0].text
    lesson = nbformat.read(ROOT / Path(name).name, as_version=4)
    assert list(cells) == [cell.id for cell in lesson.cells]
    for cell in code(notebook):
        assert all(output.output_type != "error" for output in cell.outputs)
        assert cell.execution_count


def test_the_files_are_small():
    for name in [*NOTEBOOKS.values(), *REAL_RUN]:
        assert (ROOT / name).stat().st_size < 1_000_000


def test_nothing_private_or_local_stands_in_it(notebook):
    text = json.dumps(notebook)
    assert not re.search(r"hf_[A-Za-z0-9]{20}", text)
    assert not re.search(r"(?<![\w.:/])/(?:home|root|Users|tmp)/", text)


def test_what_a_cell_may_not_do(notebook):
    for cell in code(notebook):
        assert not cell.source.startswith("%") and "autoreload" not in cell.source
        assert "tqdm.auto" not in cell.source and "tqdm.notebook" not in cell.source
        assert "Trainer" not in cell.source and "import trl" not in cell.source
        assert "trust_remote_code" not in cell.source


def test_every_code_cell_is_introduced(notebook):
    """No more than three code cells in a row without a word between them."""
    kinds = "".join(cell.cell_type[0] for cell in notebook.cells)
    assert "cccc" not in kinds and kinds[0] == "m" and kinds[-1] == "m"


def test_no_function_is_defined_twice():
    """But for the setup cell, which needs its own before it has found `utils`."""
    names = []
    for name in NOTEBOOKS.values():
        for cell in code(nbformat.read(ROOT / name, as_version=4))[2:]:
            names += [
                f"{cell.id}: {node.name}"
                for node in ast.walk(ast.parse(cell.source))
                if isinstance(node, ast.FunctionDef)
            ]
    functions = [name.split(": ")[1] for name in names]
    assert len(functions) == len(set(functions)), sorted(names)


def test_the_setup_cell_is_the_same_everywhere():
    setups = {
        next(c.source for c in nbformat.read(ROOT / name, 4).cells if c.id == "setup")
        for name in NOTEBOOKS.values()
    }
    assert len(setups) == 1
    for name in NOTEBOOKS.values():
        cells = code(nbformat.read(ROOT / name, as_version=4))
        assert [cell.id for cell in cells[:2]] == ["parameters", "setup"]
        assert cells[0].metadata.tags == ["parameters"]  # papermill adds its own below
        assert 'USE_DRIVE = False  # @param {type:"boolean"}' in cells[0].source


@pytest.mark.parametrize("name", NOTEBOOKS.values())
def test_the_sources_on_the_page_are_those_that_run(name):
    """What `show_source` displays in the committed outputs is today's code."""
    namespace = import_cells(name)
    for cell in code(nbformat.read(ROOT / name, as_version=4)):
        for call in re.findall(r"^show_source\((.*)\)$", cell.source, re.M):
            shown = eval(f"show_source({call})", namespace).data
            (output,) = (
                o for o in cell.outputs if "text/markdown" in o.get("data", {})
            )
            assert output.data["text/markdown"] == shown, cell.id


def test_every_picture_of_the_page_has_words(notebook):
    """Where nbconvert reads them; its template `lab` knows no words for pictures."""
    exporter = HTMLExporter(template_name="classic")
    page, _ = exporter.from_notebook_node(notebook)
    pictures = re.findall(r"<img[^>]*>", page)
    assert len(pictures) >= 1
    for picture in pictures:
        (words,) = re.findall(r'alt="([^"]*)"', picture)
        assert len(words) > 10 and "No description" not in words


@pytest.mark.parametrize(
    "lesson, text, numbers, code_cell",
    [
        ("1", "loss-shift", "0.19 4.19", "loss-by-hand"),
        ("2", "bce-read", "0.13 2.13 0.69", "bce"),
    ],
)
def test_a_number_of_the_prose_is_one_that_the_cell_prints(
    lesson, text, numbers, code_cell
):
    cells = {c.id: c for c in nbformat.read(ROOT / NOTEBOOKS[lesson], 4).cells}
    said = "".join(o.get("text", "") for o in cells[code_cell].outputs)
    printed = {f"{float(n):.2f}" for n in re.findall(r"\d+\.\d+", said)}
    for number in numbers.split():
        assert number in cells[text].source and number in printed


def test_the_recipes_are_six_of_three_lines_at_most():
    recipes = recipes_of_notebook_3()
    assert len(recipes) == 6
    assert max(len(recipe.splitlines()) for recipe in recipes.values()) <= 3


def setup_in(folder, given="", **environ):
    """What the setup cell leaves as working directory, or says, begun in a folder."""
    cells = nbformat.read(ROOT / NOTEBOOKS["4"], as_version=4).cells
    sources = [cell.source for cell in cells if cell.id in ("parameters", "setup")]
    found = "print(os.getcwd(), sys.path[0] == os.getcwd())"
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([given, *sources, found])],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, **environ},
    )
    return (done.stdout or done.stderr).strip().splitlines()[-1]


def test_the_setup_cell_finds_the_repository_upwards(tmp_path):
    for folder in (ROOT, ROOT / "more", ROOT / "utils" / "support"):
        assert setup_in(folder) == f"{ROOT} True"
    said = setup_in(tmp_path)
    assert said.startswith("FileNotFoundError: neither ") and "clone https://" in said


@pytest.mark.parametrize("opener", ["__vsc_ipynb_file__", "PAPERMILL_INPUT_PATH"])
def test_the_setup_cell_finds_the_repository_from_the_notebook(tmp_path, opener):
    """VS Code and papermill may start elsewhere, and say where the notebook lies."""
    given = f"{opener} = {str(ROOT / NOTEBOOKS['4'])!r}"
    assert setup_in(tmp_path, given) == f"{ROOT} True"


def test_a_foreign_folder_named_utils_is_not_taken_for_ours(tmp_path):
    (tmp_path / "utils").mkdir()
    (tmp_path / "REPO").symlink_to(ROOT)  # as the setup cell clones it on Colab
    assert setup_in(tmp_path) == f"{ROOT} True"


def test_on_colab_a_repository_that_cannot_be_cloned_is_named(tmp_path):
    git = tmp_path / "git"
    git.write_text("#!/bin/sh\nexit 128\n")
    git.chmod(0o755)
    colab = "import sys, types; sys.modules['google.colab'] = types.ModuleType('colab')"
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    assert setup_in(tmp_path, colab, PATH=path) == (
        "FileNotFoundError: git cannot clone https://github.com/OWNER/REPO.git; "
        "correct REPOSITORY in this cell"
    )


def broken_links(text, folder=ROOT):
    """The local targets of Markdown links that do not exist."""
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    return [t for t in targets if not (folder / t.replace("%20", " ")).exists()]


@pytest.mark.parametrize("name", [*NOTEBOOKS.values(), *REAL_RUN])
def test_the_links_between_files_lead_somewhere(name):
    notebook = nbformat.read(ROOT / name, as_version=4)
    text = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    assert broken_links(text, (ROOT / name).parent) == []


PAGES = ("README.md", "CONTRIBUTING.md", "exercises/README.md", *ROOT.glob("docs/*.md"))
PAGES += ("docs/real-run/README.md",)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_the_links_and_pictures_of_a_page_are_there(page):
    path = ROOT / page
    assert broken_links(path.read_text("utf8"), path.parent) == []


def test_the_readme_decides_in_a_page_and_names_every_lesson():
    readme = (ROOT / "README.md").read_text("utf8")
    assert len(readme.split()) <= 900
    for name in NOTEBOOKS.values():
        assert f"({name.replace(' ', '%20')})" in readme
    # Commands are whole on a telephone, too
    assert max(len(line) for line in readme.splitlines() if line[:4] == "    ") <= 44


def texts_of(notebook, rows):
    """The first rows of the table of texts: prompt, before and after, no rewards."""
    cells = {c.id: c for c in nbformat.read(ROOT / notebook, 4).cells}
    lines = cells["samples"].outputs[0].data["text/markdown"].splitlines()[2:]
    for row in lines[:rows]:
        prompt, *texts = (text.strip() for text in row.split("|")[1:-1])
        yield " | ".join([prompt, *(text.rsplit(" (", 1)[0] for text in texts)])


def test_the_readme_shows_the_first_ten_prompts_of_the_real_run():
    readme = (ROOT / "README.md").read_text("utf8")
    rows = list(texts_of("docs/real-run/3-RLHF.ipynb", 10))
    assert len(rows) == 10
    table = "\n".join(f"| {row} |" for row in rows)
    assert table in readme
    assert readme.index(table) < readme.index("\n## ")  # above the fold


def test_the_readme_shows_the_figures_of_both_runs():
    """As the outputs of notebook 3, and the means over the seeds."""
    readme = (ROOT / "README.md").read_text("utf8")
    real = json.loads((ROOT / "docs/real-run/results.json").read_text())["figures"]
    named = {**EARLIER_FIGURES, **FIGURES}
    cells = {c.id: c for c in nbformat.read(ROOT / NOTEBOOKS["3"], 4).cells}
    (table,) = (o.text for o in cells["after"].outputs if "text" in o)
    tiny = {line[:42].strip(): line[42:62].split() for line in table.splitlines()}
    for figure, (name, spec) in named.items():
        if figure in EARLIER_FIGURES:
            shown = re.search(rf"^\| {re.escape(name)} \| (.*) \|$", readme, re.M)
            columns = shown[1].split(" | ")
        else:
            columns = [""] * (2 - len(tiny[name])) + tiny[name]
        each = real.get(figure, {})
        theirs = [mean(each[when], spec) if when in each else "" for when in WHEN]
        row = " | ".join([*columns[:2], *theirs])
        assert f"| {name} | {row} |" in readme


def test_the_readme_and_the_requirements_name_the_same_pythons():
    """And CI tries the newest; what runs the tests is one of them."""
    readme = (ROOT / "README.md").read_text("utf8")
    low, high = re.search(r"Python (3\.\d+) to (3\.\d+)", readme).groups()
    requirements = (ROOT / "requirements.txt").read_text("utf8")
    assert requirements.startswith(f"# Python {low} or newer; tried with {low}, ")
    assert requirements.splitlines()[0].endswith(f" and {high}")
    settings = (ROOT / "docs/settings.md").read_text("utf8")
    assert f"Python {low} or newer; {low}, 3.12 and {high} are tried" in settings
    assert f"interpreter {high}" in (ROOT / ".ci/run").read_text("utf8")
    lowest = tuple(map(int, low.split(".")))
    assert sys.version_info[:2] >= lowest


def test_powershell_gets_the_readmes_two_commands():
    """What is installed and what is run, in the words of Windows."""
    readme = (ROOT / "README.md").read_text("utf8").replace("&&\n    ", "&& ")
    commands = re.findall(
        r"-m venv .*&& pip (install .*) && python (.*)$", readme, re.M
    )
    assert len(commands) == 2
    settings = (ROOT / "docs/settings.md").read_text("utf8")
    python = ".venv\\Scripts\\python"
    for install, run in commands:
        theirs = (
            f"    py -m venv .venv; {python} -m pip {install}\n    {python} {run}\n"
        )
        assert theirs in settings
