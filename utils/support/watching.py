"""Watch a run of PPO while it trains: curves that are drawn anew, and trackers.

A tracker is TensorBoard (files on this machine), wandb or trackio, as the setting
`log_to` says. Nothing is imported and nothing sent anywhere where it is empty. Their
own few lines are written here: accelerate's trackers would save three of them.
"""

import dataclasses
import importlib.util
import time
from pathlib import Path

import matplotlib.pyplot as plt
import pandas
from IPython.display import display
from tqdm import tqdm

from utils.plots import plot_ppo
from utils.processes import this_process
from utils.settings import Settings
from utils.support.learning import say_new_signs
from utils.support.notebook import somebody_is_there

PROJECT = "rlhf-notebooks"  # under which wandb and trackio file the runs
# Curves are drawn this often, and so rarely that they take a twentieth of the time
LEAST_SECONDS, TIMES_ITS_COST = 10, 20


def check_tracker(settings: Settings):
    """Raise ModuleNotFoundError, with what to install, if `log_to` is not there."""
    name = settings.log_to
    if name and importlib.util.find_spec(name) is None:
        raise ModuleNotFoundError(
            f"log_to is {name!r}, which is not installed; run `pip install {name}`, or "
            "set log_to to an empty text"
        )


class Watch:
    """Looks at a run between two rollouts: what is new goes to the tracker and plot.

    A run that goes on after an interruption is a new one in the tracker, with all of
    its figures from the beginning.
    """

    def __init__(self, settings: Settings):
        check_tracker(settings)
        self.settings, self._tracker = settings, None
        self._written, self._shown = 0, set()
        self._plot, self._next = None, time.monotonic() + LEAST_SECONDS

    def look(self, run):
        """Say what goes astray, send what is new to the tracker, and draw the curves.

        Figures go under their names in the history, the first rollout being step 1;
        the texts of a moment are a table of prompt, response and reward.
        """
        if this_process():
            return
        say_new_signs(run)
        done = len(run.history)
        moments = run.snapshots.keys() - self._shown
        if self.settings.log_to and (moments or done > self._written):
            start = TRACKERS[self.settings.log_to]
            self._tracker = self._tracker or start(self.settings)
            for step in range(done + 1):  # in this order: wandb takes no step back
                if step > self._written:
                    self._tracker.figures(run.history[step - 1], step)
                if step in moments:
                    self._tracker.texts(run.snapshots[step][1], step)
            self._written, self._shown = done, set(run.snapshots)
        if somebody_is_there():
            self._draw(run.history, ended=done == self.settings.ppo_steps)
        if done == self.settings.ppo_steps:
            self.close()

    def close(self):
        """End the run in the tracker."""
        if self._tracker:
            self._tracker.close()
        self._tracker = None

    def _draw(self, history, ended):
        if ended and self._plot:  # the next cell draws them, with more beside them
            self._plot.update({"text/plain": "(the curves are below)"}, raw=True)
        if ended or len(history) < 2 or time.monotonic() < self._next:
            return
        started = time.monotonic()
        figure = plot_ppo(history)
        data, metadata = figure.as_png()
        plt.close(figure)  # else the end of the cell shows it once more
        if self._plot:
            self._plot.update(data, metadata=metadata, raw=True)
        else:
            self._plot = display(data, metadata=metadata, raw=True, display_id=True)
        spent = time.monotonic() - started
        self._next = time.monotonic() + max(LEAST_SECONDS, TIMES_ITS_COST * spent)


def _numbers(settings):
    """The settings that are numbers: texts may name folders of this machine."""
    named = dataclasses.asdict(settings).items()
    return {name: value for name, value in named if not isinstance(value, str)}


def _run_name(settings):
    return f"{settings.preset}-{time.strftime('%Y%m%d-%H%M%S')}"


class TensorBoard:
    """Files in `runs/<preset>/log`, for `tensorboard --logdir runs/<preset>/log`."""

    def __init__(self, settings):
        from torch.utils.tensorboard import SummaryWriter

        folder = Path(settings.folder) / "log" / _run_name(settings)
        self.writer = SummaryWriter(str(folder))
        tqdm.write(f"figures go to TensorBoard: tensorboard --logdir {folder.parent}")

    def figures(self, figures, step):
        """One number of each name."""
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step, new_style=True)

    def texts(self, rows, step):
        """A table in Markdown."""
        lines = ["| prompt | response | reward |", "|---|---|---|"]
        for row in rows:
            cells = [row["prompt"], row["response"], f"{row['reward']:.2f}"]
            # A character behind which TensorBoard would see a new cell
            cells = [cell.replace("|", "\\|").replace("\n", " ") for cell in cells]
            lines.append(f"| {' | '.join(cells)} |")
        self.writer.add_text("samples", "\n".join(lines), step)

    def close(self):
        """Write what is left."""
        self.writer.close()


class Wandb:
    """wandb and trackio, which is called in the same way."""

    module = "wandb"

    def __init__(self, settings):
        self.library = importlib.import_module(self.module)
        name, config = _run_name(settings), _numbers(settings)
        self.library.init(project=PROJECT, name=name, config=config)

    def figures(self, figures, step):
        """One number of each name."""
        self.library.log(figures, step=step)

    def texts(self, rows, step):
        """A table, beside the figures of its step."""
        frame = pandas.DataFrame(rows)[["prompt", "response", "reward"]]
        table = self.library.Table(dataframe=frame)
        self.library.log({"samples": table}, step=step)

    def close(self):
        """End the run."""
        self.library.finish()


class Trackio(Wandb):
    """trackio: a data base on this machine."""

    module = "trackio"


TRACKERS = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}
