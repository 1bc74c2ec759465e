"""The rules for the notebook files and pages, as they are committed."""

import functools
import json
import math
import re
import statistics
import subprocess

import nbformat
import pytest

from practice.cells import import_cells
from tests.conftest import ROOT, code_cells, python, read
from utils import runs
from utils.evaluation import FIGURES
from utils.settings import NOTEBOOKS

LESSONS = [*NOTEBOOKS.values()]
REAL_RUN = [f"docs/real-run/{NOTEBOOKS[number]}" for number in "123"]
EVERY = [*LESSONS, *REAL_RUN]

README = (ROOT / "README.md").read_text("utf8")
BADGE = r"(?:https://|research\.google\.com/)github(?:\.com)?/([\w.-]+/[\w.-]+?)"
FIRST = (ROOT / LESSONS[0]).read_text("utf8")
OWN = re.search(BADGE + "/blob/main/", FIRST)[1]  # a fork's is another


def printed(cell):
    return "".join(output.get("text", "") for output in cell.outputs)


@pytest.mark.parametrize("name", EVERY)
def test_a_file_is_valid_small_and_of_nobody(name):
    notebook, text = read(name), (ROOT / name).read_text("utf8")
    nbformat.validate(notebook)
    assert "widgets" not in notebook.metadata and "widget-view" not in text
    assert len(text) < 1_000_000
    assert not re.search(r"(?<![\w.:/])/(?:home|root|Users|tmp)/", text)
    outputs = [out for cell in code_cells(name).values() for out in cell.outputs]
    kinds = {out.output_type for out in outputs} | {out.get("name") for out in outputs}
    assert not kinds & {"error", "stderr"}
    pictures = [out for out in outputs if "image/png" in out.get("data", {})]
    # Words for those who do not see them, where nbconvert reads them
    alts = [picture.metadata["image/png"]["alt"] for picture in pictures]
    assert all(len(alt) > 10 for alt in alts) and (alts or name not in LESSONS)


@pytest.mark.parametrize("name", LESSONS)
def test_cells_are_short_introduced_and_of_a_tiny_run(name):
    """No more than three code cells in a row without a word between them."""
    notebook, cells = read(name), code_cells(name)
    lengths = [cell.source.count("\n") + 1 for cell in cells.values()]
    assert statistics.median(lengths) <= 10 and max(lengths) <= 40
    for cell in cells.values():  # a fork's name may be longer
        lines = cell.source.replace(OWN, "OWNER/REPO").split("\n")
        assert max(map(len, lines)) <= 88
    kinds = "".join(cell.cell_type[0] for cell in notebook.cells)
    assert "cccc" not in kinds and kinds[0] == "m" and kinds[-1] == "m"
    assert "preset: tiny" in "".join(map(printed, cells.values()))
    counts = [cell.execution_count for cell in cells.values()]
    assert counts == list(range(1, len(counts) + 1))


@pytest.mark.parametrize("name", LESSONS)
def test_the_sources_on_the_page_are_those_that_run(name):
    """What `show_source` displays in the committed outputs is today's code."""
    namespace = import_cells(name)
    for cell in code_cells(name).values():
        for call in re.findall(r"^show_source\((.*)\)$", cell.source, re.M):
            shown = eval(f"show_source({call})", namespace).data
            datas = [output.get("data", {}) for output in cell.outputs]
            assert shown in [data.get("text/markdown") for data in datas], cell.id


NUMBER = r"[−-]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?"
# In prose: with a decimal point, or a percentage; no part of a formula or a name
MEASURED = r"(?<![\w.,/\[({=^_-])([−-]?\d[\d,]*\.\d+|[−-]?\d[\d,]*(?= ?%))(?![\w.]*\d)"
NO_PROSE = r"\$\$.*?\$\$|\$[^$]*\$|`[^`]*`|\]\([^)]*\)|\([^)]*arXiv[^)]*\)|^    .*$"
CONSTANTS = (math.log(2), 95.0)  # 95 %: the confidence of an interval


def as_number(text):
    return abs(float(text.replace(",", "").replace("−", "-")))


@functools.cache
def numbers_on(name):
    """All numbers of a lesson's code, its outputs, and the files that it reads."""
    texts = []
    for cell in code_cells(name).values():
        tables = [out.get("data", {}).get("text/markdown", "") for out in cell.outputs]
        files = re.findall(r"docs/[\w/-]+\.json", cell.source)
        texts += [cell.source, printed(cell), *tables]
        texts += [(ROOT / file).read_text("utf8") for file in files]
    return [as_number(x) for text in texts for x in re.findall(NUMBER, text)]


def strays(text, names):
    """The numbers in a text that these lessons have not, be it rounded or as 100 %."""
    known = {*CONSTANTS, *(x for name in names for x in numbers_on(name))}
    for found in re.finditer(MEASURED, text):
        percent = text[found.end() :].lstrip()[:1] == "%"
        near = 0.5001 * 10.0 ** -len(found[1].partition(".")[2])
        fits = known | {100 * x for x in known} if percent else known
        if all(abs(x - as_number(found[1])) > near for x in fits):
            yield found[1]


@pytest.mark.parametrize("name", LESSONS)
def test_a_number_in_prose_stands_in_an_output(name):
    """Of this lesson, or of another that the paragraph names.

    So an output that changed leaves no old figure behind, unless it is there elsewhere.
    """
    prose = [cell.source for cell in read(name).cells if cell.cell_type == "markdown"]
    for text in "\n".join(prose).splitlines():
        others = [NOTEBOOKS[x] for x in re.findall(r"(?:notebook|lesson) (\d)", text)]
        assert not [*strays(re.sub(NO_PROSE, " ", text), (name, *others))], text


def test_the_first_two_cells_are_the_same_everywhere():
    for name in LESSONS:
        (first, cell), (second, setup), *_ = code_cells(name).items()
        assert (first, second) == ("parameters", "setup")
        assert cell.metadata.tags == ["parameters"]  # papermill adds its own below
        assert "USE_DRIVE = False" in cell.source
        assert f'REPOSITORY = "https://github.com/{OWN}"' in cell.source
        assert setup.source == code_cells(LESSONS[0])["setup"].source, name


# The last one is what somebody gets who names no branch
GIT = f"""
for said in "{OWN} main" "FORK/X mine" "FORK/X main"; do
    set -- $said; mkdir -p $1/utils; echo $said >$1/utils/runs.py
    git init -q $1; git -C $1 checkout -q -B $2; git -C $1 add .
    git -C $1 -c user.name=me -c user.email=me commit -q -m $2
done
"""


@pytest.fixture(scope="module")
def github(tmp_path_factory):
    """Variables for a git that knows two repositories, whose files say of which."""
    folder = tmp_path_factory.mktemp("github")
    subprocess.run(["sh", "-ec", GIT], cwd=folder, check=True)
    key = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.{folder}/.insteadOf"}
    return {**key, "GIT_CONFIG_VALUE_0": "https://github.com/"}


# As on Colab, where a server says which notebook is open; elsewhere nobody answers
SESSIONS = """
import io, urllib.request
def answer(url, timeout):
    known = {{"http://172.28.0.12:9000/api/sessions": {!r}}}
    return io.BytesIO(known[url].encode())
urllib.request.urlopen = answer"""


def setup_in(folder, environ, given="", path=None):
    """Where the setup cell, run twice, has led; or what it said last."""
    cells, found = code_cells(NOTEBOOKS["1"]), "open('utils/runs.py').readline()"
    first, setup = cells["parameters"].source, cells["setup"].source
    open_there = path and f'[{{"path": "{path}", "type": "notebook"}}]'
    steps = [SESSIONS.format(open_there), first, given, setup, setup]
    source = "\n".join([*steps, f"print(os.getcwd(), {found}, sys.path[0])"])
    done = python("-c", source, cwd=folder, **environ)
    return (done.stdout or done.stderr).strip()


OURS = runs.__doc__.splitlines()[0]
FROM_GITHUB = "fileId=https%3A%2F%2Fgithub.com%2FFORK%2FX%2Fblob%2Fmine%2F1-SFT.ipynb"
LIES = f" = {str(ROOT / LESSONS[3])!r}"


PLACES = [
    (ROOT, "", "", OURS),  # JupyterLab
    (ROOT / "more", "", "", OURS),
    ("", "__vsc_ipynb_file__" + LIES, "", OURS),
    ("", "PAPERMILL_INPUT_PATH" + LIES, "", OURS),
    ("", "", FROM_GITHUB, "FORK/X mine"),  # Colab: the very branch
    ("", "", "", f"{OWN} main"),  # Kaggle; Colab: uploaded alone, or on Drive
    ("", 'REPOSITORY = "https://github.com/FORK/X"', "", "FORK/X main"),
]


@pytest.mark.parametrize("folder, given, said, found", PLACES)
def test_setup_finds_the_repository(tmp_path, github, folder, given, said, found):
    (tmp_path / "utils").mkdir()  # a stranger's
    place = ROOT if found == OURS else tmp_path / "repository"
    for _ in range(1 + (found != OURS)):  # what was cloned is found by another kernel
        where = setup_in(folder or tmp_path, github, given, said)
        assert where.startswith(f"{place} ") and found in where, where
        assert where.endswith(f" {place}"), where  # first on sys.path


def test_a_repository_that_cannot_be_cloned_is_a_sentence(tmp_path, github):
    said = setup_in(tmp_path, {**github, "GIT_CONFIG_KEY_0": "url./nowhere/.insteadOf"})
    assert said.endswith(f"{OWN}: see above, or set REPOSITORY")


PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "exercises/README.md"]
PAGES = [path.relative_to(ROOT).as_posix() for path in PAGES]


@pytest.mark.parametrize("page", [*PAGES, *LESSONS])
def test_the_links_and_pictures_of_a_page_are_there(page):
    text, folder = (ROOT / page).read_text("utf8"), (ROOT / page).parent
    if page in LESSONS:
        cells = read(page).cells
        text = "\n".join(c.source for c in cells if c.cell_type == "markdown")
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    targets = [target.replace("%20", " ") for target in targets]
    assert [target for target in targets if not (folder / target).exists()] == []


def test_the_readme_names_every_lesson_and_shows_the_real_run_s_first_prompts():
    assert len(README.split()) <= 900
    assert all(f"({name.replace(' ', '%20')})" in README for name in LESSONS)
    (output,) = code_cells(REAL_RUN[2])["samples"].outputs
    table = "\n".join(output.data["text/markdown"].splitlines()[2:12])
    table = re.sub(r" \(-?\d\.\d\d\) (?=\|)", " ", table)  # without the rewards
    table = re.sub(r" +", " ", table)
    assert 0 < README.index(table) < README.index("\n## ")  # above the fold


def test_the_readme_shows_the_figures_of_both_runs():
    """As the outputs of notebook 3, and the means over the seeds."""
    real = json.loads((ROOT / "docs/real-run/results.json").read_text())["figures"]
    lines = printed(code_cells(NOTEBOOKS["3"])["after-table"]).splitlines()
    tiny = {line[:42].strip(): line[42:62].split() for line in lines}
    assert len(tiny) > 12
    for figure, (name, spec) in FIGURES.items():
        row = re.search(rf"^\| {re.escape(name)} \| (.*) \|$", README, re.M)[1]
        before, after, *theirs = (column.strip() for column in row.split(" | "))
        each = {when: real.get(figure, {}).get(when) for when in ("before", "after")}
        means = [format(sum(x) / len(x), spec) if x else "" for x in each.values()]
        assert theirs == means, name
        assert name not in tiny or [x for x in (before, after) if x] == tiny[name], name
