"""Functions of the notebooks, for other lessons, checks and tests."""

import ast
import json
import linecache
from pathlib import Path

ROOT = Path(__file__).parents[1]
# The loop of PPO, as cells of notebook 3
LOOP = ("fresh-run", "collect-rollout", "ppo-advantages", "ppo-loss", "ppo-update")
LOOP += ("summarise", "train")


def sources(notebook: str) -> dict[str, str]:
    """The code cells of a notebook, by their ids.

    It is read as plain JSON, since nbformat alone takes two seconds to import.
    """
    cells = json.loads((ROOT / notebook).read_text("utf8"))["cells"]
    return {x["id"]: "".join(x["source"]) for x in cells if x["cell_type"] == "code"}


def import_cells(notebook: str, *cell_ids: str, names: dict | None = None) -> dict:
    """Run a notebook's imports and the cells with these ids; the names they define.

    `names` is what they may take from other cells. Raises KeyError if one is missing.
    """
    cells = sources(notebook)
    nodes = [node for source in cells.values() for node in ast.parse(source).body]
    imports = [x for x in nodes if isinstance(x, ast.Import | ast.ImportFrom)]
    namespace = {"__name__": Path(notebook).stem}
    exec(compile(ast.Module(imports, []), notebook, "exec"), namespace)
    namespace.update(names or {})
    for cell_id in cell_ids:
        file, source = f"{notebook}#{cell_id}", cells[cell_id]
        # So that `inspect` finds the source of a function
        linecache.cache[file] = len(source), None, source.splitlines(True), file
        exec(compile(source, file, "exec"), namespace)
    return namespace
