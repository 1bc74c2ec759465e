"""The part of the series that two notebooks share or a test must check."""

import hashlib as _hashlib
import sys as _sys
from pathlib import Path as _Path

_FOLDER = _Path(__file__).parent


def _hashes():
    files = sorted(_FOLDER.rglob("*.py"))
    return {str(f): _hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


_AT_IMPORT = _hashes()  # an imported module stays what its file was


def changed_files() -> list[str]:
    """The imported files of this package that were edited since."""
    imported = {getattr(module, "__file__", None) for module in _sys.modules.values()}
    now = _hashes()
    return [
        _Path(file).relative_to(_FOLDER.parent).as_posix()
        for file, found in _AT_IMPORT.items()
        if file in imported and now.get(file) != found
    ]
