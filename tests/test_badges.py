import shutil

import pytest

from tests.conftest import ROOT
from tools import badges


def test_set_repository_changes_every_link_and_nothing_else(tmp_path, monkeypatch):
    named = badges.named_repositories()
    (old,) = set.union(*named.values())  # the same in every file
    for file in named:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    monkeypatch.setattr(badges, "ROOT", tmp_path)
    badges.set_repository("some-one/a.repo")
    for file in named:
        text = (tmp_path / file).read_text("utf8")
        assert "some-one/a.repo" in text and old not in text, file
        assert text.replace("some-one/a.repo", old) == (ROOT / file).read_text("utf8")
    with pytest.raises(ValueError, match="OWNER/REPO.*'rlhf'"):
        badges.set_repository("rlhf")
