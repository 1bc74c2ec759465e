import shutil

import pytest

from tools import badges


def test_every_file_names_the_same_repository():
    named = badges.named_repositories()
    assert all(named.values()), named
    assert len(set.union(*named.values())) == 1, named


def test_set_repository_changes_every_link_and_nothing_else(tmp_path, monkeypatch):
    files = list(badges.named_repositories())
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(badges.ROOT / file, tmp_path / file)
    before = {file: (tmp_path / file).read_text("utf8") for file in files}
    (old,) = set.union(*badges.named_repositories().values())
    monkeypatch.setattr(badges, "ROOT", tmp_path)
    badges.set_repository("some-one/a.repo")
    assert set.union(*badges.named_repositories().values()) == {"some-one/a.repo"}
    for file in files:
        text = (tmp_path / file).read_text("utf8")
        assert text != before[file]
        assert text.replace("some-one/a.repo", old) == before[file]


def test_a_bad_name_is_refused():
    with pytest.raises(ValueError, match="OWNER/REPO.*'rlhf'"):
        badges.set_repository("rlhf")
