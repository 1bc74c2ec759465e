"""Execute the notebooks in order, and print what they measured."""

import argparse
import json
import os
import subprocess
import sys
from asyncio import InvalidStateError
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from tqdm import tqdm

from utils.evaluation import FIGURES, figures_table
from utils.processes import MEETING
from utils.settings import PRESETS, load_settings, parse_field
from utils.support.artefacts import STAGES, notebook_of, write_text
from utils.support.checkpoint import CHECKPOINT
from utils.support.expected import expected
from utils.support.launch import (
    check,
    is_one_of_several,
    launch,
    let_the_first_speak,
    number,
    report,
)
from utils.support.notebook import NOTEBOOKS, ROOT, SERIES

# The figures of notebooks 1 and 2 by name: what each is, and how it is printed.
EARLIER_FIGURES = {
    "validation_loss": ("SFT: validation loss [nats per token]", ".3f"),
    "validation_perplexity": ("SFT: validation perplexity", ".2f"),
    "accuracy": ("reward model: validation accuracy", ".1%"),
}


class Client(NotebookClient):
    """Executes a notebook, and shows on one line where it is and what it prints."""

    bar: tqdm

    async def async_execute_cell(self, cell, cell_index, **kwargs):
        """Move the bar to the cell, and execute it."""
        self.bar.update(cell_index - self.bar.n)
        return await super().async_execute_cell(cell, cell_index, **kwargs)

    def process_message(self, msg, cell, cell_index):
        """Show the last line that the cell printed, its progress bar for example."""
        if msg["msg_type"] == "stream":
            lines = msg["content"]["text"].replace("\r", "\n").split("\n")
            said = [line.strip() for line in lines if line.strip()]
            self.bar.set_postfix_str(said[-1][:60] if said else "")
        return super().process_message(msg, cell, cell_index)


def execute(name: str, folder: Path, env: dict):
    """Run one notebook in a fresh kernel, and write the executed copy to the folder.

    The copy is written also when a cell fails; nbclient's CellExecutionError then
    goes on to the caller, or its DeadKernelError if there is no kernel any more.
    """
    notebook = nbformat.read(ROOT / name, as_version=4)
    copy = folder / Path(name).name
    client = Client(
        notebook,
        timeout=None,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        store_widget_state=False,
        # Newer ones warn that what they say to this machine is not encrypted
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
        resources={"metadata": {"path": str(ROOT)}},
    )
    # The kernel of this very Python, not one that the user has registered elsewhere.
    manager = client.create_kernel_manager()
    manager.kernel_spec_manager = KernelSpecManager(kernel_dirs=[])
    with tqdm(total=len(notebook.cells), desc=name, unit="cell") as client.bar:
        try:
            # What a kernel says itself, not a cell, is how it lost the other processes
            quiet = {"stderr": subprocess.DEVNULL} if is_one_of_several() else {}
            client.execute(env=env, **quiet)
            client.bar.update(client.bar.total - client.bar.n)
        except (AssertionError, AttributeError, InvalidStateError) as error:
            # At a Ctrl-C nbclient ends the kernel, and stumbles over that in many ways
            raise DeadKernelError("interrupted") from error
        finally:
            write_text(copy, nbformat.writes(notebook) + "\n")


def check_first_cell(name: str, settings):
    """Raise ValueError if the first cell of a notebook asks for another run."""
    cells = nbformat.read(ROOT / name, as_version=4).cells
    asked = {}
    exec("\n".join(c.source for c in cells if c.id == "parameters"), asked)
    preset, changes = asked.get("PRESET"), asked.get("CHANGES")
    if changes or preset not in (None, "", settings.preset):
        raise ValueError(
            f"{name} says PRESET = {preset!r} and CHANGES = {changes!r} in its first "
            "cell, which stand above this command; empty them there, and use --preset "
            "and --set here"
        )


def measured(settings, notebooks) -> tuple[dict, str]:
    """What has been measured, by artefact; a table of what these notebooks made."""
    folder = ROOT / settings.folder
    found = {
        name: json.loads((folder / name / "metrics.json").read_text())
        for name in STAGES
        if (folder / name / "metrics.json").exists()
    }
    before, after = {}, {}
    for name, metrics in found.items():
        if NOTEBOOKS[notebook_of(name)] not in notebooks:
            continue
        before.update(metrics.get("before", {}))
        after.update(metrics["after"])
    if not after:
        return found, ""
    figures = {**EARLIER_FIGURES, **FIGURES}
    return found, figures_table(before, after, expected(settings), figures)


def parse(argv):
    """The command line, checked before anything starts."""
    parser = argparse.ArgumentParser(
        prog="python -m utils", description="Run the series: SFT, reward model, PPO."
    )
    parser.add_argument("--preset", default="tiny", choices=list(PRESETS))
    parser.add_argument(
        "--only",
        default=",".join(SERIES),
        help=f"notebooks, for example 1,2; there are {','.join(NOTEBOOKS)}; all: these",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", dest="changes"
    )
    parser.add_argument(
        "--save-outputs",
        action="store_true",
        help="also write the outputs into the notebooks themselves",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        help="how many train together, on a GPU each if there are any",
    )
    options = parser.parse_args(argv)
    numbers = NOTEBOOKS if options.only == "all" else options.only.split(",")
    if unknown := set(numbers) - set(NOTEBOOKS):
        parser.error(
            f"there is no notebook {' and no '.join(sorted(unknown))}; --only takes "
            f"all, or numbers of {','.join(NOTEBOOKS)} with commas between"
        )
    several = options.processes > 1 or is_one_of_several()
    if several and (others := set(numbers) - set(SERIES)):
        parser.error(
            f"several processes are for the notebooks {','.join(SERIES)}, and --only "
            f"has {','.join(sorted(others))}"
        )
    options.notebooks = [NOTEBOOKS[n] for n in sorted(set(numbers))]
    # The older kernel that Colab has warns of Python's own modules without the second
    ours = {"RLHF_PRESET": options.preset, "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    options.env = {**os.environ, **ours}
    try:
        for change in options.changes:
            field, equals, value = change.partition("=")
            if not equals:
                raise ValueError(f"--set takes FIELD=VALUE, got {change!r}")
            parse_field(field, value)
            options.env[f"RLHF_{field.upper()}"] = value
        options.settings = load_settings(options.preset, options.env)
        check(options.processes, options.settings)
        for name in options.notebooks:
            check_first_cell(name, options.settings)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(argv=None) -> int:
    """Run what the command line asks for; 1 if a cell failed or was cut off."""
    options = parse(argv)
    if options.processes > 1 and not is_one_of_several():
        arguments = list(sys.argv[1:] if argv is None else argv)
        return launch(options.processes, arguments, options.settings.device)
    let_the_first_speak()
    return run(options)


def run(options) -> int:
    """Execute the notebooks, and write and print what they measured."""
    folder = ROOT / options.settings.folder
    folder.mkdir(parents=True, exist_ok=True)
    copies = folder / f"process-{number()}" if number() else folder
    copies.mkdir(exist_ok=True)
    saved = options.settings.folder / CHECKPOINT
    if NOTEBOOKS["3"] in options.notebooks and (ROOT / saved).exists():
        print(f"PPO goes on from {saved}, if that is of this very run (one that has")
        print("finished is not trained again); to begin anew, delete the file")
    for name in options.notebooks:
        options.env[MEETING] = name
        try:
            execute(name, copies, options.env)
        except (CellExecutionError, DeadKernelError) as error:
            if is_one_of_several():
                report(f"{name}: {getattr(error, 'evalue', '') or error}")
                return 1
            # At a Ctrl-C the kernel dies, or an older one ends its cell first
            if getattr(error, "ename", "KeyboardInterrupt") != "KeyboardInterrupt":
                print(
                    f"\n{name} failed. The cell and its error:\n\n{error}",
                    file=sys.stderr,
                )
                return 1
            rest = options.notebooks[options.notebooks.index(name) :]
            numbers = ",".join(Path(one).name[0] for one in rest)
            print(
                f"\n{name} lost its kernel: interrupted, or out of memory "
                "(then lower the batch sizes); run the same command again, with --only "
                f"{numbers}. PPO goes on from where it was saved last.",
                file=sys.stderr,
            )
            return 1
        if options.save_outputs and not number():
            executed = (folder / Path(name).name).read_text("utf8")
            write_text(ROOT / name, executed)
    if number():
        return 0
    metrics, table = measured(options.settings, options.notebooks)
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    if table:
        print(f"\n{table}")
    print(f"\nExecuted notebooks and metrics.json: {options.settings.folder}")
    return 0
