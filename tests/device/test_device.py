"""The project on `sham`, a device that is not the CPU: what only a GPU would show."""

import json
import shutil

import pytest

from tests.conftest import ROOT, python, run_series

TOOLS = ("c++", "ninja")
MISSING = [tool for tool in TOOLS if not shutil.which(tool)]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"to build a device takes {MISSING}"),
]
STARTUP = """from tests.device import sham
get_ipython().input_transformers_post.append(sham.cell)"""  # cells ask for cuda, too
SHORT = {"train_rows": 320, "max_new_tokens": 12, "train_anyway": True}
SHORT |= {"ppo_episodes": 64, "ppo_rollout_size": 32, "ppo_minibatch_size": 16}
# GRPO, of lesson 5, takes no pieces of a minibatch
SHORT |= {"ppo_micro_batch_size": 16, "ppo_epochs": 2, "eval_prompts": 16}
SHORT |= {"normalise_samples": 32, "possible_samples": 2, "precision": "float32"}


def test_in_a_process_of_its_own():
    """Autograd counts the devices once: this process may have begun without one."""
    done = python("-m", "pytest", "-p", "tests.device.sham", "tests/device/on_sham.py")
    assert done.returncode == 0, done.stdout[-5000:]


def test_all_lessons_run_on_it(world, tmp_path):
    """As on a Mac's GPU, which has no float64; on_sham.py has float16."""
    shutil.copytree(world, tmp_path / "tiny" / "world")
    startup = tmp_path / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "device.py").write_text(STARTUP)
    environ = {"IPYTHONDIR": str(tmp_path), "PYTHONPATH": str(ROOT), "SHAM_AS": "mps"}
    changes = SHORT | {"runs_dir": tmp_path}
    done = run_series("--only", "all", changes=changes, **environ)
    assert done.returncode == 0, done.stderr[-3000:]
    executed = [*(tmp_path / "tiny").glob("*.ipynb")]
    assert len(executed) == 9
    for notebook in executed:
        assert "on sham in float32" in notebook.read_text()
    found = json.loads((tmp_path / "tiny/policy/metrics.json").read_text())
    assert len(found["history"]) == 2 and found["after"]["kl"] > 0
