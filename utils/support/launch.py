"""Start several processes of `python -m utils`, and say in a sentence how they ended.

accelerate starts them and watches over them: when one ends badly it ends the others.
Each executes the notebooks in a kernel of its own, which ends with it.
"""

import logging
import os
import sys
import time
from importlib.util import find_spec

import torch

from utils.processes import check_gpus, check_shares

# What an error says in a process that has lost another one
LOST = ("Connection closed by peer", "Connection reset by peer", "process exited")
PATIENCE = 20  # seconds in which accelerate notices who ended first


def is_one_of_several() -> bool:
    """Whether this process was started together with others."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def number() -> int:
    """The number of this process among those that were started together, from 0 on."""
    return int(os.environ["RANK"]) if is_one_of_several() else 0


def check(n: int, settings):
    """Raise ValueError if n processes cannot be started on this machine."""
    if n < 1:
        raise ValueError(f"--processes must be 1 or more, got {n}")
    if n > 1:
        if settings.device == "mps":
            raise ValueError(
                "device is mps, a Mac's one GPU; set it to cpu for several"
            )
        check_gpus(n, settings.device)
        check_shares(n, settings)
        if find_spec("accelerate") is None:
            raise ValueError(
                "several processes need accelerate, which is not installed; "
                "pip install accelerate"
            )


def launch(n: int, arguments: list[str], device: str) -> int:
    """Run `python -m utils` with these arguments in n processes of this machine.

    The exit status: 0, or 1 after a sentence that says which of them failed first.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable()  # elastic's account of what is said in a sentence below
    if device == "cpu" or not torch.cuda.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"
        # Threads of several processes that spin on the same cores wait for each other
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // n)))
    options = {
        "--num_processes": n,
        "--num_machines": 1,
        "--mixed_precision": "no",
        "--dynamo_backend": "no",
        "--main_process_port": 0,  # any that is free
    }
    words = [str(word) for option in options.items() for word in option]
    words = ["--multi_gpu", *words, "--module", "utils", *arguments]
    try:
        launch_command(launch_command_parser().parse_args(words))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        said = failure.message  # a dictionary, if `report` wrote it
        said = said["message"] if isinstance(said, dict) else said.split("\n")[0]
        said = said.removeprefix("RuntimeError: ")
        print(
            f"\nprocess {rank} of {n} failed, so all were ended: {said}\n"
            "Run the same command again; what was saved is whole.",
            file=sys.stderr,
        )
        return 1
    except (SignalException, KeyboardInterrupt):
        print(f"\ninterrupted; all {n} processes were ended", file=sys.stderr)
        return 1
    return 0


def let_the_first_speak():
    """Of processes that were started together, and their kernels, only one prints."""
    if number():
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(nowhere, stream)


def report(error: str):
    """Leave word of an error where accelerate looks for the one that came first.

    An error that only says that another process is gone waits for its own end.
    """
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    if any(words in error for words in LOST):
        time.sleep(PATIENCE)
    get_error_handler().record_exception(RuntimeError(error))
