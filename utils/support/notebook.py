"""Notebooks as a source of code: show a function in one, take functions out of one."""

import ast
import inspect
from pathlib import Path

import nbformat
from IPython.display import Markdown

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ("1-SFT.ipynb", "2-RM Training.ipynb", "3-RLHF.ipynb")


def show_source(*things) -> Markdown:
    """The source of functions or classes, for display in a notebook."""
    return Markdown("```python\n" + "\n\n".join(map(inspect.getsource, things)) + "```")


def import_cells(notebook: str, *cell_ids: str, names: dict | None = None) -> dict:
    """Run a notebook's imports and the cells with these ids; the names they define.

    `names` is what they may take from other cells. Raises KeyError, listing the cells
    there are, if one is missing.
    """
    cells = nbformat.read(ROOT / notebook, as_version=4).cells
    sources = {cell.id: cell.source for cell in cells if cell.cell_type == "code"}
    for cell_id in cell_ids:
        if cell_id not in sources:
            raise KeyError(f"{notebook} has no code cell {cell_id!r}: {list(sources)}")
    imports = [
        node
        for source in sources.values()
        for node in ast.parse(source).body
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    namespace = {}
    exec(compile(ast.Module(imports, []), notebook, "exec"), namespace)
    namespace.update(names or {})
    for cell_id in cell_ids:
        exec(compile(sources[cell_id], f"{notebook}#{cell_id}", "exec"), namespace)
    return namespace
