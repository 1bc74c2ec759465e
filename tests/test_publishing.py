"""What GitHub does with the project: its workflows' scripts, and what they read."""

import os
import re
import shutil
import subprocess

import yaml

from tests.conftest import ROOT, needs_posix

BADGE = "https://colab.research.google.com/github/{}/blob/"
SETUP = r"REPOSITORY = \"https://github.com/{}"


def git(folder, *arguments):
    command = ["git", "-c", "user.name=me", "-c", "user.email=me", *arguments]
    return subprocess.check_output(command, cwd=folder, text=True).strip()


@needs_posix
def test_a_fork_s_first_push_writes_its_name_and_nothing_else(tmp_path):
    clone, hub = tmp_path / "clone", tmp_path / "hub.git"
    rooms = ("", "exercises/**/", "more/", "docs/real-run/")
    files = [file for room in rooms for file in ROOT.glob(f"{room}*.ipynb")]
    files += [ROOT / "README.md", ROOT / "CITATION.cff", ROOT / ".github/rename.sh"]
    git(tmp_path, "init", "-q", "--bare", "-b", "main", hub)
    git(tmp_path, "clone", "-q", hub, clone)
    for file in files:
        (clone / file.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, clone / file.relative_to(ROOT))
    git(clone, "add", ".")
    git(clone, "commit", "-qm", "theirs")
    git(clone, "push", "-q")

    environ = {**os.environ, "GITHUB_REPOSITORY": "new-owner/its.name_2"}
    workflow = (ROOT / ".github/workflows/rename.yml").read_text("utf8")
    *_, step = yaml.safe_load(workflow)["jobs"]["rename"]["steps"]
    for pushes in (2, 2):  # a second push finds nothing to do
        subprocess.run(["bash", "-ec", step["run"]], cwd=clone, env=environ, check=True)
        assert git(hub, "rev-list", "--count", "main") == str(pushes)
    assert git(clone, "status", "--porcelain") == ""

    old = re.search(BADGE.format("(.+?)"), files[0].read_text("utf8"))[1]
    unnamed = re.compile(r"\]\((\S+\.ipynb)\)(.*)\(docs/settings\.md#on-colab\)")
    row = rf"]({{0}}){{1}}({BADGE.format('new-owner/its.name_2')}main/{{0}})"
    code = 'repository-code: "https://github.com/{}"'
    for file in files[:-1]:
        text = file.read_bytes().decode()
        text, n = unnamed.subn(lambda x: row.format(*x.groups()), text)
        assert n == 9 or BADGE.format(old) in text or code.format(old) in text, file
        for place in (BADGE, SETUP, code):
            text = text.replace(place.format(old), place.format("new-owner/its.name_2"))
        assert (clone / file.relative_to(ROOT)).read_bytes() == text.encode(), file


def test_every_page_has_a_place_on_the_site():
    toc = yaml.safe_load((ROOT / "docs/site/toc.yml").read_text("utf8"))
    chapters = [chapter for part in toc["parts"] for chapter in part["chapters"]]
    entered = {f"{x['file']}.md" for x in chapters if "file" in x} | {"README.md"}
    rooms = ("", "docs/**/", "exercises/")
    pages = [page for room in rooms for page in ROOT.glob(f"{room}*.md")]
    assert {page.relative_to(ROOT).as_posix() for page in pages} <= entered
