"""Every number of the series in one place, and what the machine it runs on allows."""

import contextlib
import dataclasses
import difflib
import math
import os
import random
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Settings:
    """The settings of one run; the defaults are the preset `full`.

    Any field can be set from the environment as RLHF_<FIELD>, for example
    RLHF_PPO_EPISODES=2000. Raises ValueError for a value out of its range.
    """

    preset: str = "full"
    # What is trained on what: a name on the Hugging Face Hub, or a local folder
    model_name: str = "gpt2"
    dataset_name: str = "stanfordnlp/sst2"
    runs_dir: str = "runs"  # artefacts go to <runs_dir>/<preset>/ [folder]
    seed: int = 42
    precision: str = "auto"  # of the trunk: auto, float32, bfloat16 or float16
    max_tokens: int = 66  # a longer text is cut to this, EOS included [tokens]

    # 1. Supervised fine-tuning
    sft_min_tokens: int = 8  # shorter phrases are dropped, EOS included [tokens]
    sft_epochs: int = 1  # [passes over the training split]
    sft_batch_size: int = 32  # [phrases]
    sft_lr: float = 1e-4  # peak learning rate
    sft_warmup: float = 0.05  # share of the steps in which it rises; then it falls to 0

    # 2. Reward model
    rm_epochs: int = 1  # [passes over the training split]
    rm_batch_size: int = 32  # [phrases]
    rm_lr: float = 5e-5  # peak learning rate, falling linearly to 0

    # 3. PPO: the prompts
    prompt_min_words: int = 9  # prompts are cut from sentences this long [words]
    prompt_min_tokens: int = 2  # [tokens]
    prompt_max_tokens: int = 7  # [tokens]
    max_new_tokens: int = 48  # of a response, EOS included [tokens]
    temperature: float = 1.0  # of the sampling, and of every log-probability
    # 3. PPO: the loop
    ppo_episodes: int = 6_144  # [responses], in rollouts of
    ppo_rollout_size: int = 128  # [responses], each used for
    ppo_epochs: int = 4  # [passes over the rollout], in
    ppo_minibatch_size: int = 64  # [responses for one optimiser step], in pieces of
    ppo_micro_batch_size: int = 64  # [responses on the device at once]
    ppo_lr: float = 6e-5  # peak learning rate, falling linearly to 0
    value_head_lr: float = 1e-3  # the same for the value head, which starts from zeros
    kl_coef: float = 0.2  # beta, the price of a nat of KL [normalised score per nat]
    kl_target: float = 0.0  # an adaptive beta steers KL to this [nats]; 0: none
    kl_horizon: int = 10_000  # how slowly it does so [responses]
    gamma: float = 1.0  # discount
    gae_lambda: float = 0.95  # GAE: 0 trusts the value head, 1 the sampled return
    clip_range: float = 0.2  # of the probability ratio
    value_clip_range: float = 1.0  # of the value [normalised score]
    value_coef: float = 0.1  # weight of the value loss
    max_grad_norm: float = 1.0
    max_approx_kl: float = 0.2  # ends an update early [nats per token]; 0: no bound
    missing_eos_score: float = -1.0  # of a response that never ends [normalised score]
    # 3. PPO: the measurements
    normalise_samples: int = 512  # SFT responses that fix the score's scale [responses]
    eval_prompts: int = 256  # held-out prompts, before and after [responses]
    time_machine_prompts: int = 6  # of them, followed through training; 0: none
    frontier_rollouts: int = 0  # PPO at each of a few betas; 0: none [rollouts]
    best_of_n: int = 16  # to compare these with [responses to each held-out prompt]
    checkpoint_every: int = 8  # PPO saves its state, to go on from [rollouts]

    def __post_init__(self):
        may_be_zero = ("kl_coef", "kl_target", "value_coef", "seed", "max_approx_kl")
        may_be_zero += ("time_machine_prompts", "frontier_rollouts")
        shares = ("sft_warmup", "gamma", "gae_lambda")
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, str):
                continue
            if not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value}")
            if name in shares and not 0 <= value <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {value}")
            if name in may_be_zero and value < 0:
                raise ValueError(f"{name} must be 0 or more, got {value}")
            if name not in (*shares, *may_be_zero, "missing_eos_score") and value <= 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        if self.precision not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(
                "precision must be auto, float32, bfloat16 or float16, "
                f"got {self.precision!r}"
            )
        for name in ("max_tokens", "sft_min_tokens", "normalise_samples"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} must be 2 or more, got {getattr(self, name)}")
        if self.prompt_max_tokens < self.prompt_min_tokens:
            raise ValueError(
                f"prompt_max_tokens ({self.prompt_max_tokens}) must be at least "
                f"prompt_min_tokens ({self.prompt_min_tokens})"
            )
        if self.kl_target and not self.kl_coef:
            raise ValueError(
                f"kl_target is {self.kl_target} but kl_coef is 0, and an adaptive beta "
                "never leaves 0; set kl_coef above 0"
            )
        for whole, part in (
            ("ppo_episodes", "ppo_rollout_size"),
            ("ppo_rollout_size", "ppo_minibatch_size"),
            ("ppo_minibatch_size", "ppo_micro_batch_size"),
        ):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"{whole} ({getattr(self, whole)}) must be a multiple of "
                    f"{part} ({getattr(self, part)})"
                )

    @property
    def folder(self) -> Path:
        """Where the artefacts of this preset lie."""
        return Path(self.runs_dir) / self.preset

    @property
    def ppo_steps(self) -> int:
        """How many rollouts PPO collects."""
        return self.ppo_episodes // self.ppo_rollout_size


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
    ppo_lr=2e-4,
    value_head_lr=3e-3,
    kl_coef=0.1,
    value_coef=1.0,
    frontier_rollouts=10,
)
PRESETS = {"full": FULL, "tiny": TINY}


def _nearest(word, words) -> str:
    near = difflib.get_close_matches(word, words, n=1, cutoff=0)
    return near[0]


def parse_field(name: str, text: str):
    """The value of the field `name` written as `text`, in the field's type.

    Raises ValueError, naming the nearest field, if there is no such field or the
    text is not a value of its type.
    """
    types = {field.name: field.type for field in dataclasses.fields(Settings)}
    types.pop("preset")
    if name not in types:
        raise ValueError(
            f"there is no setting {name!r}; the nearest is {_nearest(name, types)!r}"
        )
    try:
        return types[name](text.replace("_", "") if types[name] is int else text)
    except ValueError:
        kind = {int: "a whole number", float: "a number"}[types[name]]
        raise ValueError(f"{name} must be {kind}, got {text!r}") from None


def load_settings(preset: str, environ=os.environ) -> Settings:
    """The preset, with what RLHF_<FIELD> variables of the environment change.

    Raises ValueError for an unknown preset, an RLHF_ name that is no field, or a
    bad value.
    """
    if preset not in PRESETS:
        raise ValueError(
            f"there is no preset {preset!r}; "
            f"the nearest is {_nearest(preset, PRESETS)!r}"
        )
    changes = {}
    for variable, text in environ.items():
        if variable.startswith("RLHF_") and variable != "RLHF_PRESET":
            try:
                name = variable.removeprefix("RLHF_").lower()
                changes[name] = parse_field(name, text)
            except ValueError as error:
                raise ValueError(f"environment variable {variable}: {error}") from None
    return dataclasses.replace(PRESETS[preset], **changes)


def seed_everything(seed: int):
    """Seed Python and torch (CPU and GPU), so that a cell can be repeated."""
    random.seed(seed)
    torch.manual_seed(seed)


def get_device(settings: Settings) -> torch.device:
    """The GPU if there is one, else the CPU, with a warning if that will be slow."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if settings.preset == "full":
        warnings.warn(
            "no CUDA GPU found: on a CPU the preset 'full' takes hours per notebook "
            "(an estimate). On Colab choose Runtime > Change runtime type > T4 GPU; "
            "anywhere, RLHF_PRESET=tiny runs in minutes. Going on with the CPU.",
            stacklevel=2,
        )
    return torch.device("cpu")


def trunk_dtype(settings: Settings, device: torch.device) -> torch.dtype:
    """The precision of the trunk: what `precision` says, or the device's best.

    bfloat16 from compute capability 8.0. torch.cuda.is_bf16_supported() also says
    yes where bfloat16 is emulated, as on Colab's T4; float16 is fast there.
    """
    if settings.precision != "auto":
        return getattr(torch, settings.precision)
    if device.type != "cuda":
        return torch.float32
    capable = torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if capable else torch.float16


def autocast(settings: Settings, device: torch.device):
    """A context in which the trunk computes in its precision."""
    dtype = trunk_dtype(settings, device)
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def grad_scaler(settings: Settings, device: torch.device) -> torch.amp.GradScaler:
    """Loss scaling, which float16 needs; in other precisions it does nothing."""
    return torch.amp.GradScaler(
        device.type, enabled=trunk_dtype(settings, device) == torch.float16
    )
