"""The part of the series that two notebooks share or a test must check."""

import hashlib
import sys
import types
from pathlib import Path

_FOLDER = Path(__file__).parent


def _hashes():
    files = sorted(_FOLDER.rglob("*.py"))
    return {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


# Of when the first module was imported; what is imported stays what its file was
_AT_IMPORT = types.MappingProxyType(_hashes())


def changed_files() -> list[str]:
    """The imported files of this package that were edited since."""
    imported = {getattr(module, "__file__", None) for module in sys.modules.values()}
    now = _hashes()
    return [
        Path(file).relative_to(_FOLDER.parent).as_posix()
        for file, found in _AT_IMPORT.items()
        if file in imported and now.get(file) != found
    ]
