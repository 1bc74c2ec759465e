"""What goes wrong in a classroom, done for real to the notebooks.

Kernels are killed, cells are run twice and out of order, numbers explode, and other
models come in. `python -m pytest -m faults` runs these tests, and prints a table.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile

import datasets
import nbformat
import psutil
import pytest
import torch
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
)

from tests.conftest import ROOT, run_series
from utils.data import load_tokenizer
from utils.support.checkpoint import read_state
from utils.support.notebook import NOTEBOOKS

pytestmark = [pytest.mark.faults, pytest.mark.slow]

TOKEN = "hf_" + "Thisisnotatokenbutacanaryof34chars"
SHORT = {
    "RLHF_EVAL_PROMPTS": "32",
    "RLHF_NORMALISE_SAMPLES": "64",
    "RLHF_PPO_EPISODES": "1280",
    "RLHF_PPO_ROLLOUT_SIZE": "128",
    "RLHF_CHECKPOINT_EVERY": "1",
    "RLHF_TIME_MACHINE_PROMPTS": "2",
    "RLHF_TRAIN_ANYWAY": "1",  # so few reviews teach the reward model nothing
    "OMP_NUM_THREADS": "1",  # for models this small, and some runs go on side by side
}


@pytest.fixture(scope="module")
def short(world, tmp_path_factory):
    """Variables for a short run, on a small part of the tiny world's reviews."""
    folder = tmp_path_factory.mktemp("few reviews")
    reviews = datasets.load_dataset(str(world / "dataset"))
    for split, rows in (("train", 1600), ("validation", 300)):
        file = folder / "data" / f"{split}-0.parquet"
        file.parent.mkdir(exist_ok=True)
        reviews[split].select(range(rows)).to_parquet(file)
    names = {"RLHF_MODEL_NAME": world / "model", "RLHF_DATASET_NAME": folder}
    return {**SHORT, **{name: str(value) for name, value in names.items()}}


def files(folder):
    """Each file below a folder, and when it was changed."""
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project, with a home of its own; both paths."""
    folder = tmp_path_factory.mktemp("home") / "project"
    skip = shutil.ignore_patterns(".*", "runs", "__pycache__", "*.aside-*")
    shutil.copytree(ROOT, folder, ignore=skip)
    return folder, folder.parent


@pytest.fixture(scope="module")
def whole(short, project):
    """A run of the three notebooks that nobody disturbed: its folder, its new files."""
    folder, home = project
    before = files(home)
    done = run_series(cwd=folder, HOME=str(home), HF_TOKEN=TOKEN, **short)
    assert done.returncode == 0, done.stderr[-3000:]
    new = {path for path, time in files(home).items() if before.get(path) != time}
    return folder / "runs" / "tiny", new, done.stdout + done.stderr


def figures(folder, name="policy"):
    """What was measured, without the seconds that it took."""
    found = json.loads((folder / name / "metrics.json").read_text())
    found.pop("seconds", None)
    return found


def test_nothing_is_written_elsewhere(whole, project, survived):
    """Only below runs/, and in the caches of the libraries."""
    folder, home = project
    allowed = [
        folder / "runs",
        *(home / f".{x}" for x in ("cache", "config", "ipython")),
    ]
    allowed.append(home / ".local" / "share" / "jupyter")
    elsewhere = [
        path
        for path in whole[1]
        if path.suffix != ".pyc" and not any(a in path.parents for a in allowed)
    ]
    assert whole[1] and not elsewhere
    survived("files written outside runs/ and the caches", "none")


def test_a_token_is_never_printed_or_stored(whole, survived):
    _, new, said = whole
    assert TOKEN not in said
    assert not [path for path in new if TOKEN.encode() in path.read_bytes()]
    survived(f"HF_TOKEN is set: searched {len(new)} files and all output", "not found")


def copied(whole, runs, *names):
    """A folder of runs with some of the undisturbed run's artefacts."""
    for name in names:
        shutil.copytree(whole[0] / name, runs / "tiny" / name)
    return {"RLHF_RUNS_DIR": str(runs)}


def kill_all(process):
    """A process and all that it started, at once; on Windows too."""
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children(recursive=True)
        for one in (process, *children):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()


@contextlib.contextmanager
def started(*arguments, **environ):
    """`python -m utils`, running; `said()` waits until it has ended."""
    ours = {k: v for k, v in os.environ.items() if not k.startswith("RLHF_")}
    with tempfile.TemporaryFile("w+", encoding="utf8") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "utils", *arguments],
            cwd=ROOT,
            env={**ours, "CUDA_VISIBLE_DEVICES": "", **environ},
            stdout=log,
            stderr=log,
        )

        def said():
            process.wait()
            log.seek(0)
            return log.read()

        process.said = said
        try:
            yield process
        finally:
            kill_all(process)


def wait_for_rollouts(process, checkpoint, number):
    """Wait until so many rollouts are saved; how many they are."""
    while process.poll() is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.05)
        if checkpoint.exists():
            done = len(read_state(checkpoint)[1]["run"]["history"])
            if done >= number:
                return done
    raise AssertionError(process.said()[-3000:])


def test_ppo_goes_on_after_kill_9(whole, short, tmp_path, survived):
    """The kernel is killed, then everything; run all ends where it would have."""
    environ = {**short, **copied(whole, tmp_path, "sft", "reward_model")}
    checkpoint = tmp_path / "tiny" / "ppo.safetensors"
    with started("--only", "3", **environ) as process:
        first = wait_for_rollouts(process, checkpoint, 2)
        for kernel in psutil.Process(process.pid).children(recursive=True):
            kernel.kill()
        error = process.said()
    assert process.returncode == 1
    assert "3-RLHF.ipynb lost its kernel" in error
    assert "run the same command again, with --only 3. PPO goes on from" in error
    with started("--only", "3", **environ) as process:
        second = wait_for_rollouts(process, checkpoint, first + 2)
        kill_all(process)
    assert not (tmp_path / "tiny" / "policy").exists()
    done = run_series("--only", "3", **environ)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith(f"PPO goes on from {checkpoint}, if ")
    said = (tmp_path / "tiny" / "3-RLHF.ipynb").read_text()
    resumed = int(re.search(r"PPO goes on after (\d+) of 10 rollouts", said)[1])
    assert second <= resumed < 10
    # The file that it went on from could be replaced, also where Windows is imitated
    assert len(read_state(checkpoint)[1]["run"]["history"]) == 10
    assert figures(tmp_path / "tiny") == figures(whole[0])
    weights = "policy/model.safetensors"
    assert (tmp_path / "tiny" / weights).read_bytes() == (
        whole[0] / weights
    ).read_bytes()
    survived(
        f"kernel, then process killed after {first} and {second} of 10 rollouts",
        f"goes on after {resumed}; the same figures and weights, to the last bit",
    )


class Kernel:
    """A notebook in a kernel of its own, in which cells are run by their ids."""

    def __init__(self, name, environ, stack):
        self.notebook = nbformat.read(ROOT / name, as_version=4)
        self.cells = self.notebook.cells
        self.ids = [cell.id for cell in self.cells if cell.cell_type == "code"]
        path = {"metadata": {"path": str(ROOT)}}
        self.client = NotebookClient(self.notebook, timeout=None, resources=path)
        stack.enter_context(self.client.setup_kernel(env=environ))

    def run(self, *ids):
        for cell_id in ids:
            (place,) = (i for i, cell in enumerate(self.cells) if cell.id == cell_id)
            self.client.execute_cell(self.cells[place], place)

    def cell(self, cell_id):
        (cell,) = (cell for cell in self.cells if cell.id == cell_id)
        return cell

    def say(self, source):
        """Run this in a new cell."""
        self.cells.append(nbformat.v4.new_code_cell(source))
        self.run(self.cells[-1].id)


@pytest.fixture
def kernel(short):
    """`kernel(name, **environ)` starts a `Kernel` for a short run."""
    with contextlib.ExitStack() as stack:
        ours = {k: v for k, v in os.environ.items() if not k.startswith("RLHF_")}
        ours |= {"CUDA_VISIBLE_DEVICES": "", "RLHF_PRESET": "tiny", **short}
        yield lambda name, **environ: Kernel(name, {**ours, **environ}, stack)


@pytest.mark.parametrize(
    "name, artefact", [(NOTEBOOKS["1"], "sft"), (NOTEBOOKS["2"], "reward_model")]
)
def test_every_cell_can_be_run_again(kernel, whole, tmp_path, survived, name, artefact):
    """And what is saved afterwards is what was saved before."""
    notebook = kernel(name, RLHF_RUNS_DIR=str(tmp_path))
    notebook.run(*notebook.ids)
    folder = tmp_path / "tiny"
    expected = figures(whole[0], artefact)
    assert figures(folder, artefact) == expected
    file = f"{artefact}/model.safetensors"
    weights = (folder / file).read_bytes()
    assert weights == (whole[0] / file).read_bytes()
    for cell_id in notebook.ids:
        notebook.run(cell_id, "save")
        assert figures(folder, artefact) == expected, cell_id
        assert (folder / file).read_bytes() == weights, cell_id
    fault = f"{name}: each of {len(notebook.ids)} cells run again"
    survived(fault, "the same model and figures")


INTERRUPTED = """
real_step, steps = run.optimizer.step, []
def interrupted_step(**figures):
    steps.append(1)
    if len(steps) == 5 * 8 + 3:  # the policy has moved, and nothing is recorded
        raise KeyboardInterrupt
    real_step(**figures)
run.optimizer.step = interrupted_step
"""


def test_every_cell_of_notebook_3_can_be_run_again(kernel, whole, tmp_path, survived):
    runs = copied(whole, tmp_path, "sft", "reward_model")
    notebook = kernel(NOTEBOOKS["3"], **runs)
    folder, expected, ids = tmp_path / "tiny", figures(whole[0]), notebook.ids
    # Interrupted in an update; the cell of the preflight goes back to the last save
    start, loop = ids.index("start"), ids.index("loop")
    notebook.run(*ids[:loop])
    notebook.say(INTERRUPTED)
    with pytest.raises(CellExecutionError, match="KeyboardInterrupt"):
        notebook.run("loop")
    notebook.run("start", *ids[start + 1 :])
    assert figures(folder) == expected
    survived(
        "the loop is interrupted in an update", "back to the last save; same figures"
    )
    for cell_id in ids:
        notebook.run(cell_id, "after", "save")
        assert figures(folder) == expected, cell_id
    # All that comes before the loop once more, between its start and the loop
    notebook.say("checkpoint.discard()")
    notebook.run("start", *ids[:start], "snapshot", "loop", "after", "save")
    assert figures(folder) == expected
    assert len(expected["history"]) == 10
    fault = f"{NOTEBOOKS['3']}: each of {len(ids)} cells run again"
    survived(fault, "the same policy and figures")


def recipes_of_notebook_3():
    """The code of "Make it yours", by the title of each recipe."""
    cells = nbformat.read(ROOT / NOTEBOOKS["3"], as_version=4).cells
    (text,) = (cell.source for cell in cells if cell.id == "yours-text")
    recipes = {}
    for part in re.split(r"^\d\. ", text, flags=re.M)[1:]:
        lines = [line[8:] for line in part.splitlines() if line.startswith(" " * 8)]
        recipes[re.search(r"\*\*(.+?)\*\*", part)[1]] = "\n".join(lines)
    return recipes


def test_every_recipe_of_notebook_3_does_what_it_says(
    kernel, whole, tmp_path, world, survived
):
    """Each typed into a new cell where it says, and run on from there."""
    notebook = kernel(NOTEBOOKS["3"], **copied(whole, tmp_path, "sft", "reward_model"))
    recipes, ids = recipes_of_notebook_3(), notebook.ids
    place = {cell: number for number, cell in enumerate(ids)}
    notebook.run(*ids)
    expected, folder = figures(whole[0]), tmp_path / "tiny"
    assert figures(folder) == expected

    def printed(source):
        notebook.say(source)
        return "".join(o.get("text", "") for o in notebook.cells[-1].outputs)

    said = printed(recipes["My own prompt"])
    assert said.count("my uncle thinks that the film") == 6
    assert re.findall(r"^(before|after) ", said, re.M) == ["before"] * 3 + ["after"] * 3
    notebook.say(recipes["Another curve"])
    assert any("image/png" in o.get("data", {}) for o in notebook.cells[-1].outputs)
    # Another KL estimator: from the preflight on, and PPO begins anew
    notebook.say(recipes["Another KL estimator in the reward"])
    notebook.run(*ids[place["start"] :])
    assert figures(folder)["history"] != expected["history"]
    assert "had another token_rewards" in str(notebook.cell("start").outputs)
    # Negative instead of positive: below the cell that loads the reward model
    notebook.run("load")
    notebook.say(recipes["Negative instead of positive"])
    notebook.run(*ids[place["load"] + 1 :])
    judged = figures(folder)
    assert judged["after"]["judged_positive"] < judged["before"]["judged_positive"]
    # Another data set, another model: in the first cell
    rows = ["review,sentiment", "fine,good", "dull,bad", "witty,good", "bland,bad"]
    (tmp_path / "reviews.csv").write_text("\n".join(rows))
    named = {"reviews.csv": tmp_path / "reviews.csv", "distilgpt2": world / "model"}
    for name in ("My own data set", "Another model"):
        source = recipes[name]
        for said, there in named.items():
            source = source.replace(f'"{said}"', f'"{there}"')
        notebook.say(source + "\n" + notebook.cell("settings").source)
        if name == "My own data set":
            labels = printed("print(load_reviews(settings)['train']['label'][:])")
    assert printed("print(settings.model_name)").strip() == str(world / "model")
    assert "labels: positive is 'good' (2 rows), negative is" in labels
    assert labels.endswith("[1, 0]\n")  # of four, one of each is kept back
    survived("the six recipes of notebook 3", "each does what it says")


def said_by(done, number, runs):
    """The error in which a notebook ended, of `python -m utils`."""
    assert done.returncode == 1
    notebook = nbformat.read(runs / "tiny" / NOTEBOOKS[str(number)], as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    (error,) = (output for output in outputs if output.output_type == "error")
    assert "\n" not in error.evalue
    return f"{error.ename}: {error.evalue}"


def test_what_ends_a_run_is_said(whole, short, tmp_path, survived):
    """Learning rates that explode, and a reward model made with other settings."""
    stopped = "(nan|inf), so this step was not taken and the weights are those of the"
    cases = {
        "RLHF_SFT_LR": (1, "1e30", f"^FloatingPointError: the loss is {stopped}"),
        "RLHF_RM_LR": (2, "1e30", f"^FloatingPointError: the loss is {stopped}"),
        "RLHF_PPO_LR": (
            3,
            "1e30",
            f"^FloatingPointError: the policy loss is {stopped}",
        ),
        "RLHF_RM_EPOCHS": (
            3,
            "2",
            "^ValueError: .*reward_model was made with rm_epochs 1 instead of 2; run",
        ),
    }
    with contextlib.ExitStack() as stack:
        processes, kept = {}, {}
        for field, (number, value, _) in cases.items():
            runs = tmp_path / field
            environ = {**short, **copied(whole, runs, "sft", "reward_model")}
            kept[field] = {p: p.read_bytes() for p in runs.rglob("*") if p.is_file()}
            run = started("--only", str(number), **{**environ, field: value})
            processes[field] = stack.enter_context(run)
        for field, process in processes.items():
            process.wait()
            number, value, says = cases[field]
            said = said_by(process, number, tmp_path / field)
            assert re.search(says, said), said
            # what was there is there
            assert all(p.read_bytes() == content for p, content in kept[field].items())
            survived(f"{field}={value} in notebook {number}", said)


def other_model(folder, config, tokenizer):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def llama_tokenizer(texts):
    """As Llama's: words begin with ▁, every text with <s>, and there is no padding."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special)
    tokenizer.train_from_iterator(texts, trainer)
    template = {"single": "<s> $A", "special_tokens": [("<s>", 1)]}
    tokenizer.post_processor = processors.TemplateProcessing(**template)
    replace, strip = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    steps = [replace, decoders.ByteFallback(), decoders.Fuse(), strip]
    tokenizer.decoder = decoders.Sequence(steps)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def opt_tokenizer(tokenizer):
    """As OPT's: every text begins with the token that ends one."""
    words, eos = tokenizer.backend_tokenizer, tokenizer.eos_token
    template = {"single": f"{eos} $A", "special_tokens": [(eos, 0)]}
    words.post_processor = processors.TemplateProcessing(**template)
    names = {"bos_token": eos, "eos_token": eos}
    return PreTrainedTokenizerFast(tokenizer_object=words, **names)


def other_models(world, short, folder):
    """Folders with models that learners might name instead."""
    gpt2s = load_tokenizer(str(world / "model"))
    reviews = datasets.load_dataset(short["RLHF_DATASET_NAME"])["train"]["sentence"]
    llamas = llama_tokenizer(reviews)
    ids = {"vocab_size": 1000, "bos_token_id": 0, "eos_token_id": 0}
    larger = GPT2Config(n_layer=4, n_head=4, n_embd=96, n_positions=96, **ids)
    opts = opt_tokenizer(load_tokenizer(str(world / "model")))
    distilled = OPTConfig(
        hidden_size=48,
        word_embed_proj_dim=32,
        ffn_dim=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=80,
        do_layer_norm_before=False,
        pad_token_id=1,
        **ids,
    )
    llama = LlamaConfig(
        vocab_size=len(llamas),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    return {
        "a larger GPT-2": other_model(folder / "larger", larger, gpt2s),
        "a distilled OPT": other_model(folder / "distilled", distilled, opts),
        "a Llama": other_model(folder / "llama", llama, llamas),
    }


@pytest.fixture(scope="module", autouse=True)
def runs_of_others(world, short, tmp_path_factory):
    """The three notebooks with each of them, from the first test here to the last."""
    folder = tmp_path_factory.mktemp("models")
    with contextlib.ExitStack() as stack:
        runs = {}
        for name, model in other_models(world, short, folder).items():
            environ = {"RLHF_MODEL_NAME": model, "RLHF_RUNS_DIR": str(folder / name)}
            # After so few reviews, random weights judge no better than guessing
            run = started(**{**short, **environ})
            runs[name] = (stack.enter_context(run), folder / name / "tiny")
        yield runs


def test_other_models_run_by_changing_the_name_alone(runs_of_others, survived):
    for name, (process, folder) in runs_of_others.items():
        said = process.said()
        assert process.returncode == 0, f"{name}: {said[-3000:]}"
        after = figures(folder)["after"]
        assert all(abs(value) < 1e6 for value in after.values())
        sft = figures(folder, "sft")
        loss = sft["after"]["validation_loss"]
        assert loss < sft["before"]["validation_loss"] - 0.5
        survived(f"{name}, random weights", f"three notebooks; SFT loss {loss:.2f}")
