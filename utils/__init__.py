"""The part of the series that two notebooks share or a test must check."""

import os
from pathlib import Path

# Before torch is imported: threads that wait for work would keep busy the cores that
# other processes of this machine need
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# What is imported stays as its file was now, whatever is edited later
_AT_IMPORT = {file: file.read_bytes() for file in Path(__file__).parent.glob("*.py")}


def changed_files() -> list[str]:
    """The files of this package that were edited since it was imported."""
    now = {file: file.read_bytes() if file.exists() else b"" for file in _AT_IMPORT}
    return [f"utils/{file.name}" for file in now if now[file] != _AT_IMPORT[file]]
