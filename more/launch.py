"""Several processes of this machine, which begin and end together."""

import ctypes
import os
import sys

from torch.distributed.elastic.multiprocessing.errors import record


def cores() -> int:
    """How many processor cores this process may use: a container may have fewer."""
    get = getattr(os, "sched_getaffinity", None)  # Linux has it
    return len(get(0)) if get else os.cpu_count()


def take_part(work):
    """Do the work as one of several processes; torchrun hears why, if it fails."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, 9)  # the kernel kills it when torchrun is no more
    return record(work)()


def launch(n: int, module: str, arguments: list[str]):
    """Become torchrun, and run `python -m module` in n processes of this machine.

    If one of them fails, all are ended, and its report says why each of them did.
    """
    # Threads of several processes that spin on the same cores wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // n)))
    words = f"-m torch.distributed.run --standalone --nproc-per-node {n}"
    words += f" --local-ranks-filter 0 -m {module}"  # the first one alone prints
    os.execv(sys.executable, [sys.executable, *words.split(), *arguments])
