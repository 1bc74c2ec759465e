"""Two processes that meet, and what happens to the second one.

`python -m tests.more.processes_at_work WHAT` starts them; they print their numbers.
"""

import os
import signal
import sys
from functools import partial

from accelerate import PartialState
from accelerate.utils import gather_object

from more.launch import launch, take_part


def work(what: str):
    state = PartialState(cpu=True)
    pids = gather_object([os.getpid()])
    if state.is_main_process:
        print(*pids, flush=True)
    state.wait_for_everyone()
    if state.process_index == 1:
        if what == "raises":
            raise ValueError("it rains")
        if what == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "waits":
            signal.pause()
    state.wait_for_everyone()


if __name__ == "__main__":
    if "RANK" in os.environ:
        take_part(partial(work, sys.argv[1]))
    else:
        launch(2, "tests.more.processes_at_work", sys.argv[1:])
