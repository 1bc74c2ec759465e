"""`python -m utils`: execute the notebooks in order, and print what they measured."""

import argparse
import ast
import contextlib
import json
import os
import sys
from asyncio import InvalidStateError
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from tqdm import tqdm

from utils.settings import NOTEBOOKS, PRESETS, ROOT, STAGES, load_settings


class Client(NotebookClient):
    """Executes a notebook, and shows on one line where it is and what it prints."""

    def process_message(self, msg, cell, cell_index):
        """Move the bar to the cell, and show the last line that it printed."""
        self.bar.update(cell_index - self.bar.n)
        if words := msg["content"].get("text", "").split():
            self.bar.set_postfix_str(" ".join(words[-9:])[-60:])
        return super().process_message(msg, cell, cell_index)


def execute(notebook, copy: Path):
    """Run a notebook in a fresh kernel; the executed copy is written in any case."""
    client = Client(
        notebook,
        record_timing=False,
        coalesce_streams=True,
        store_widget_state=False,
        # Newer kernels warn that their ports on this machine are not encrypted
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
        resources={"metadata": {"path": str(ROOT)}},
    )
    # The kernel of this very Python, not one that the user has registered elsewhere
    specs = KernelSpecManager(kernel_dirs=[])
    client.create_kernel_manager().kernel_spec_manager = specs
    with tqdm(total=len(notebook.cells), desc=copy.name, unit="cell") as client.bar:
        try:
            # Without it the older kernel that Colab has warns of Python's own modules
            client.execute(env={**os.environ, "PYDEVD_DISABLE_FILE_VALIDATION": "1"})
            client.bar.update(client.bar.total - client.bar.n)
        except (AssertionError, AttributeError, InvalidStateError) as error:
            # At a Ctrl-C nbclient ends the kernel, and stumbles over that
            raise DeadKernelError("interrupted") from error
        finally:
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(nbformat.writes(notebook) + "\n", encoding="utf8")


def with_parameters(file: Path, preset: str | None, changes: dict) -> tuple:
    """A notebook whose first cell says this preset and changes, and its settings.

    What the cell says already stays where the command says nothing.
    """
    notebook, parameters = nbformat.read(file, as_version=4), {}
    cell = next(cell for cell in notebook.cells if cell.id == "parameters")
    exec(cell.source, parameters)
    preset = preset or parameters["PRESET"] or os.environ.get("RLHF_PRESET") or "tiny"
    changes = parameters["CHANGES"] | changes
    cell.source += f"\nPRESET, CHANGES = {preset!r}, {changes!r}"
    return notebook, load_settings(preset, changes)


def parse(argv=None) -> tuple[dict, bool]:
    """The notebooks that the command line asks for, checked before anything starts."""
    parser = argparse.ArgumentParser(prog="python -m utils")
    parser.add_argument("--preset", choices=PRESETS, help="else RLHF_PRESET, or tiny")
    known = ",".join(NOTEBOOKS)
    parser.add_argument("--only", default="1,2,3", help=f"all, or some of {known}")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--save-outputs", action="store_true", help="in the notebooks")
    options, changes = parser.parse_args(argv), {}
    chosen = (known if options.only == "all" else options.only).split(",")
    if unknown := set(chosen) - NOTEBOOKS.keys():
        parser.error(f"--only takes all, or some of {known}, not {unknown}")
    for change in options.set:
        field, _, text = change.partition("=")
        changes[field] = text  # also one without quotes, such as gpt2 or 4,5
        with contextlib.suppress(ValueError, SyntaxError):
            if not isinstance(value := ast.literal_eval(text), tuple):
                changes[field] = value
    try:
        files = [ROOT / NOTEBOOKS[number] for number in sorted(set(chosen))]
        made = {x: with_parameters(x, options.preset, changes) for x in files}
    except ValueError as error:
        parser.error(str(error))
    return made, options.save_outputs


def main(argv=None):
    """Run what the command line asks for; SystemExit says which cell failed."""
    made, save_outputs = parse(argv)
    before, after = {}, {}
    for file, (notebook, settings) in made.items():
        try:
            execute(notebook, ROOT / settings.folder / file.name)
        except (CellExecutionError, DeadKernelError, KeyboardInterrupt) as error:
            # An older kernel lets the cell fail before it ends
            if getattr(error, "ename", "KeyboardInterrupt") != "KeyboardInterrupt":
                sys.exit(f"\n{file.name} failed. The cell and its error:\n\n{error}")
            sys.exit(
                f"\n{file.name} lost its kernel ({type(error).__name__}: {error}): "
                "interrupted, or out of memory (then lower the batch sizes); run the "
                "same command again, with --only for what is left. PPO goes on from "
                "where it was saved last."
            )
        if save_outputs:
            sources = [cell.source for cell in nbformat.read(file, as_version=4).cells]
            for cell, source in zip(notebook.cells, sources, strict=True):
                cell.source = source
            beside = file.with_suffix(".unfinished")  # a full disk costs no lesson
            beside.write_text(nbformat.writes(notebook) + "\n", encoding="utf8")
            beside.replace(file)
        if file.name[0] in "123":
            name = STAGES[int(file.name[0]) - 1]
            metrics = ROOT / settings.folder / name / "metrics.json"
            metrics = json.loads(metrics.read_text())
            before, after = before | metrics["before"], after | metrics["after"]
    if after:
        # Here, since it takes seconds, and until now there was a bar to look at
        from utils.evaluation import expected, figures_table

        print(f"\n{figures_table(before, after, expected(settings))}")
    print(f"\nExecuted notebooks: {settings.folder}")


if __name__ == "__main__":
    main()
