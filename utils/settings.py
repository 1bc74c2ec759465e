"""Every number of the series in one place, and what its notebooks are called."""

import dataclasses
import difflib
import math
import os
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
LESSONS = sorted(ROOT.glob("[1-3]-*.ipynb")) + sorted(ROOT.glob("more/[4-9]-*.ipynb"))
NOTEBOOKS = {file.name[0]: file.relative_to(ROOT).as_posix() for file in LESSONS}
STAGES = ("sft", "reward_model", "policy")  # what notebooks 1, 2 and 3 make


@dataclass(frozen=True)
class Settings:
    """The settings of one run; the defaults are the preset `full`.

    Raises ValueError, with the remedy, for a value of another type or out of range.
    """

    preset: str = "full"
    model_name: str = "gpt2"  # a name on the Hugging Face Hub, or a folder
    dataset_name: str = "stanfordnlp/sst2"  # likewise; or a file: CSV, JSONL, Parquet
    dataset_config: str = ""  # which one, where several data sets share a name
    text_column: str = "sentence"
    label_column: str = "label"
    positive_label: str = "1"  # or several: 4,5 or >3
    negative_label: str = ""  # likewise; empty: the only other label
    validation_split: str = "validation"  # without one, a tenth of train is kept back
    train_rows: int = 0  # so many rows drawn from train; 0: all
    seed: int = 42
    precision: str = "auto"  # of the trunk: auto, float32, bfloat16 or float16
    max_tokens: int = 66  # longer texts are cut [tokens]
    batch_size: int = 32  # of SFT and the reward model [phrases]

    # 1. Supervised fine-tuning
    sft_min_tokens: int = 8  # shorter phrases are dropped, EOS included [tokens]
    sft_epochs: int = 1  # [passes over the training split]
    sft_lr: float = 1e-4  # learning rate, reached after a twentieth of the steps

    # 2. Reward model
    rm_epochs: int = 1  # [passes over the training split]
    rm_lr: float = 5e-5  # learning rate at the start, falling linearly to 0

    # 3. PPO
    prompt_max_tokens: int = 7  # prompts have two to so many [tokens]
    max_new_tokens: int = 48  # of a response, EOS included [tokens]
    temperature: float = 1.0  # of the sampling, and of every log-probability
    ppo_episodes: int = 4_096  # [responses], in rollouts of
    ppo_rollout_size: int = 128  # [responses], each used for
    ppo_epochs: int = 2  # [passes over the rollout], in steps of
    ppo_minibatch_size: int = 64  # [responses], worked out in pieces of
    ppo_micro_batch_size: int = 64  # [responses at once]
    ppo_lr: float = 6e-5  # learning rate, falling linearly to 0
    ppo_warmup: int = 4  # [rollouts] before it has risen: Adam's first steps are long
    value_head_lr: float = 1e-3  # of the value head, which starts from zeros
    kl_coef: float = 0.1  # beta [normalised score per nat of KL]
    # What an adaptive beta steers the KL to [nats]; 0: none. J counts the first beta
    kl_target: float = 0.0
    gae_lambda: float = 0.95  # 0 trusts the value head, 1 the sampled return
    clip_range: float = 0.2  # of the probability ratio
    value_clip_range: float = 1.0  # of the value [normalised score]
    value_coef: float = 0.1  # weight of the value loss
    max_approx_kl: float = 0.2  # ends an update early [nats per token]; 0: no bound
    missing_eos_score: float = -2.0  # of a response that never ends [normalised score]
    normalise_samples: int = 512  # SFT responses that fix the scale of the scores
    eval_prompts: int = 256  # held-out prompts, before and after [responses]
    possible_samples: int = 32  # for J* [responses of each model to each prompt]

    # How it runs; no artefact depends on it
    runs_dir: str = "runs"  # models and checkpoints: <runs_dir>/<preset>/ [folder]
    device: str = "auto"  # auto (cuda or cpu), cpu, cuda or mps
    train_anyway: bool = False  # PPO starts although it would not learn

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = _converted(field.name, field.type, getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        if self.kl_target and not self.kl_coef:
            raise ValueError(f"kl_coef must be above 0 for kl_target {self.kl_target}")
        sizes = ("ppo_episodes", "ppo_rollout_size", "ppo_minibatch_size")
        for name, part in zip(sizes, (*sizes[1:], "ppo_micro_batch_size"), strict=True):
            size, piece = getattr(self, name), getattr(self, part)
            if size % piece:
                raise ValueError(
                    f"{name} ({size}) must be a multiple of {part} ({piece})"
                )

    @property
    def changes(self) -> dict:
        """The settings that differ from the preset, by name."""
        preset = load_settings(self.preset, {"runs_dir": self.runs_dir})
        preset = vars(preset) | {"runs_dir": FULL.runs_dir}
        return {name: x for name, x in vars(self).items() if x != preset[name]}

    def that_change(self, artefact: str) -> dict:
        """The settings on which `sft`, `reward_model` or `policy` depends, by name.

        The fields stand in blocks: everybody's, SFT's, the reward model's, PPO's. A
        policy depends on all of them, since it learns from both other models.
        """
        # Weights are float32 in any precision (Checkpoint compares the precision), and
        # a smaller micro-batch, as a full GPU wants it, gives the same gradient
        apart = ("precision", "ppo_micro_batch_size")
        names = [name for name in vars(self) if name not in apart]
        ends = ("sft_min_tokens", "rm_epochs", "prompt_max_tokens", "runs_dir")
        sft, reward_model, policy, end = map(names.index, ends)
        own = {"sft": slice(sft, reward_model), "policy": slice(sft, end)}
        own["reward_model"] = slice(reward_model, policy)
        found = {
            name: getattr(self, name) for name in names[:sft] + names[own[artefact]]
        }
        for name in ("model_name", "dataset_name"):  # a world that moved with its runs
            found[name] = found[name].replace(f"{self.runs_dir}/", "runs/")
        return found

    @property
    def folder(self) -> Path:
        """Where the models of this preset lie."""
        return Path(self.runs_dir) / self.preset

    @property
    def ppo_steps(self) -> int:
        """How many rollouts PPO collects."""
        return self.ppo_episodes // self.ppo_rollout_size


CHOICES = {"device": ("auto", "cpu", "cuda", "mps")}
CHOICES["precision"] = ("auto", "float32", "bfloat16", "float16")
KINDS = {int: "a whole number", float: "a finite number", bool: "True or False"}
ABOVE_0 = math.ulp(0.0)  # the smallest float above 0
# The least value of a number, if it is not 1 (whole numbers) or ABOVE_0 (others)
LEAST = dict.fromkeys(("train_rows", "seed", "ppo_warmup", "gae_lambda"), 0)
LEAST |= dict.fromkeys(("kl_coef", "kl_target", "max_approx_kl", "value_coef"), 0)
LEAST |= dict.fromkeys(("max_tokens", "sft_min_tokens", "prompt_max_tokens"), 2)
LEAST |= {"normalise_samples": 2, "possible_samples": 2, "missing_eos_score": -math.inf}


def _converted(name: str, kind: type, value):
    """The value in the type of its field: 1e4 and 2.0 may stand for whole numbers."""
    plain = isinstance(value, bool | int | float | str)
    number = plain and not isinstance(value, bool | str) and math.isfinite(value)
    fits = {str: plain, bool: plain and value in (True, False), float: number}
    fits[int] = number and value == int(value)
    if not fits[kind]:
        raise ValueError(f"{name} must be {KINDS.get(kind, 'a text')}, got {value!r}")
    if kind is str:  # a folder may be given as ~/mine
        value = os.path.expanduser(str(value))
    value, most = kind(value), 1 if name == "gae_lambda" else math.inf
    if value not in (choices := CHOICES.get(name, (value,))):
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")
    least = LEAST.get(name, 1 if kind is int else ABOVE_0)
    if kind in (int, float) and not least <= value <= most:
        bound = f"{least} or more" if most == math.inf else f"from {least} to {most}"
        bound = "above 0" if least == ABOVE_0 else bound
        raise ValueError(f"{name} must be {bound}, got {value}")
    return value


FULL = Settings()
TINY = Settings(
    preset="tiny",
    model_name="runs/tiny/world/model",
    dataset_name="runs/tiny/world/dataset",
    sft_min_tokens=5,
    sft_lr=1e-3,
    rm_lr=1e-3,
    max_new_tokens=32,
    ppo_episodes=7_680,
    ppo_rollout_size=256,
    ppo_epochs=4,
    ppo_lr=3e-4,
    ppo_warmup=2,
    value_head_lr=3e-3,
    value_coef=1.0,
    possible_samples=64,
)
PRESETS = {"full": FULL, "tiny": TINY}


def load_settings(preset: str, changes: dict | None = None) -> Settings:
    """The preset with some settings changed, by name.

    With another `runs_dir` the tiny world lies there, too. Raises ValueError for an
    unknown preset or name, with the nearest there is, or for a bad value.
    """
    changes = dict(changes or {})
    names = [field.name for field in dataclasses.fields(Settings)][1:]
    for name, known in ((preset, list(PRESETS)), *((name, names) for name in changes)):
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0)
            kind = "setting" if known is names else "preset"
            raise ValueError(f"there is no {kind} {name!r}; the nearest is {near[0]!r}")
    if preset == "tiny":
        world = f"{changes.get('runs_dir', TINY.runs_dir)}/tiny/world"
        changes = {"model_name": f"{world}/model", **changes}
        changes = {"dataset_name": f"{world}/dataset", **changes}
    return dataclasses.replace(PRESETS[preset], **changes)
