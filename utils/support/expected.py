"""What the tiny preset is expected to measure: mean and spread over several seeds.

`python -m tools.expected` measures `expected.json`, which lies beside this file.
"""

import json
from pathlib import Path

from utils.settings import as_written
from utils.training import get_device

FILE = Path(__file__).with_name("expected.json")


def expected(settings) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of each figure after training, by its name.

    Empty if they do not apply: with other settings, and on a GPU (they were measured
    on a CPU, in float32).
    """
    measured = json.loads(FILE.read_text())
    then = as_written(measured["settings"])
    if any(then[k] != v for k, v in settings.that_change("figures").items()):
        return {}
    if get_device(settings).type != "cpu":
        return {}
    return {name: tuple(found) for name, found in measured["figures"].items()}
