"""The part of the series that two notebooks share or a test must check."""

import os
from pathlib import Path

# Set before torch is imported: by default its idle threads spin, on cores that other
# processes of the machine need
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# The files as they are imported; an edit from now on does not reach this process
_AT_IMPORT = {file: file.read_bytes() for file in Path(__file__).parent.glob("*.py")}


def check_code_is_current():
    """Raise RuntimeError if a file of `utils` has changed since it was imported."""
    now = {file: file.read_bytes() if file.exists() else b"" for file in _AT_IMPORT}
    if changed := [f"utils/{x.name}" for x in now if now[x] != _AT_IMPORT[x]]:
        raise RuntimeError(
            f"{' and '.join(changed)} changed after this kernel had imported the old "
            "version, which would run on; restart the kernel, and run the cells again"
        )
