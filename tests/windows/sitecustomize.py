"""As on Windows, a file that is mapped into memory is neither replaced nor deleted.

Python runs a file of this name when it starts, if it finds one: tests/conftest.py puts
this folder on the path, so that the commands and kernels that tests start know it too.
Weights that were read from a file may still be mapped to it, which Linux, where the
tests run, lets everybody overwrite. (What writes into a mapped file in place is not
noticed.)
"""

import os
import sys

MAPS = "/proc/self/maps"  # what is mapped into this process; Linux has it


def mapped() -> set[str]:
    """The files that are mapped into this process."""
    with open(MAPS, encoding="utf8", errors="surrogateescape") as lines:
        fields = (line.rstrip("\n").split(maxsplit=5) for line in lines)
        return {row[5] for row in fields if len(row) == 6 and row[5].startswith("/")}


def refuse(event, arguments):
    """An audit hook: raises PermissionError for a mapped file, or a folder of one."""
    if event == "os.rename":
        source, target, source_folder, target_folder = arguments
        paths = [(source, source_folder), (target, target_folder)]
    elif event == "os.remove":
        paths = [arguments]
    else:
        return
    there = mapped()
    for path, folder in paths:
        base = os.readlink(f"/proc/self/fd/{folder}") if folder >= 0 else os.getcwd()
        place, name = os.path.split(os.path.join(base, os.fsdecode(path)))
        full = os.path.join(os.path.realpath(place), name)
        if full in there or any(one.startswith(full + os.sep) for one in there):
            raise PermissionError(13, "a mapped file is in use, as on Windows", full)


if os.path.exists(MAPS):
    sys.addaudithook(refuse)
