"""The moving picture of README and notebook 3: `python -m workshop.moving`."""

from practice.cells import import_cells
from utils.runs import NOTEBOOKS

CELLS = ("loop", "train-exactly", "whole-response", "grpo-policy-loss", "ways")
CELLS += ("exact-path",)

if __name__ == "__main__":
    import_cells(NOTEBOOKS["5"], *CELLS)["moving_picture"]()
