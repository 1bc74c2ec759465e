"""The part of the series that two notebooks share or a test must check."""

import os
from pathlib import Path

# Set before torch is imported: by default its idle threads spin, on cores that other
# processes of the machine need
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# The files as they are imported; an edit from now on does not reach this process
_AT_IMPORT = {file: file.read_bytes() for file in Path(__file__).parent.glob("*.py")}


def changed_files() -> list[str]:
    """The files of this package that were edited since it was imported."""
    now = {file: file.read_bytes() if file.exists() else b"" for file in _AT_IMPORT}
    return [f"utils/{file.name}" for file in now if now[file] != _AT_IMPORT[file]]
