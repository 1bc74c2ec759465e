"""Every number of the series in one place."""

import dataclasses
import difflib
import math
import os
from dataclasses import dataclass
from pathlib import Path

# What a setting changes: each artefact is taken up only with the same settings, a PPO
# run goes on only with the same, and expected figures hold only for the same.
ALL = ("sft", "reward_model", "policy", "figures")
SFT = ("sft", "figures")
REWARD_MODEL = ("reward_model", "figures")
POLICY = ("policy", "figures")
NOTHING = ()
# The settings that are one of a few words
CHOICES = {
    "device": ("auto", "cpu", "cuda", "mps"),
    "precision": ("auto", "float32", "bfloat16", "float16"),
    "log_to": ("", "tensorboard", "wandb", "trackio"),
}


def setting(default, changes=POLICY, least=None, above=0, most=math.inf):
    """A setting, what it changes, and the range in which a number must lie.

    From `least` on if that is given, else greater than `above`; up to `most`.
    """
    low = {"above": above} if least is None else {"least": least}
    metadata = {"changes": changes, "most": most, **low}
    return dataclasses.field(default=default, metadata=metadata)


def check_choice(name: str, value: str, choices: tuple[str, ...]):
    """Raise ValueError, listing the choices, unless the value is one of them."""
    if value not in choices:
        *others, last = (word or "empty" for word in choices)
        listed = f"{', '.join(others)} or {last}"
        raise ValueError(f"{name} must be {listed}, got {value!r}")


@dataclass(frozen=True)
class Settings:
    """The settings of one run; the defaults are the preset `full`.

    Any field can be set from the environment as RLHF_<FIELD>, for example
    RLHF_PPO_EPISODES=2000. Raises ValueError for a value out of its range.
    """

    preset: str = setting("full", ALL)
    # What is trained on what: a name on the Hugging Face Hub, or a local folder
    model_name: str = setting("gpt2", ALL)
    dataset_name: str = setting("stanfordnlp/sst2", ALL)  # or a file: CSV, JSONL, ...
    # What is called how in the data set
    dataset_config: str = setting("", ALL)  # which one, where several have one name
    text_column: str = setting("sentence", ALL)
    label_column: str = setting("label", ALL)
    positive_label: str = setting("1", ALL)  # or several: 4,5 or >3
    negative_label: str = setting("", ALL)  # likewise; empty: the only other one
    train_split: str = setting("train", ALL)
    validation_split: str = setting("validation", ALL)
    train_rows: int = setting(0, ALL, least=0)  # so many drawn from train; 0: all
    # Share of train that is kept back if there is no validation split
    validation_share: float = setting(0.1, ALL, least=0.01, most=0.5)
    runs_dir: str = setting("runs", NOTHING)  # artefacts: <runs_dir>/<preset>/ [folder]
    # The expected figures hold for any seed
    seed: int = setting(42, ("sft", "reward_model", "policy"), least=0)
    device: str = setting("auto", NOTHING)  # auto (cuda or cpu), cpu, cuda or mps
    precision: str = setting("auto")  # of the trunk: auto, float32, bfloat16 or float16
    max_tokens: int = setting(66, ALL, least=2)  # longer texts are cut [tokens]

    # 1. Supervised fine-tuning
    sft_min_tokens: int = setting(8, SFT, least=2)  # of a phrase, EOS included [tokens]
    sft_epochs: int = setting(1, SFT)  # [passes over the training split]
    sft_batch_size: int = setting(32, SFT)  # [phrases]
    sft_lr: float = setting(1e-4, SFT)  # peak learning rate
    # Share of the steps in which it rises; then it falls to 0
    sft_warmup: float = setting(0.05, SFT, least=0, most=1)

    # 2. Reward model
    rm_epochs: int = setting(1, REWARD_MODEL)  # [passes over the training split]
    rm_batch_size: int = setting(32, REWARD_MODEL)  # [phrases]
    rm_lr: float = setting(5e-5, REWARD_MODEL)  # peak, falling linearly to 0

    # 3. PPO: the prompts
    prompt_min_words: int = setting(9)  # they are cut from sentences this long [words]
    prompt_min_tokens: int = setting(2)  # [tokens]
    prompt_max_tokens: int = setting(7)  # [tokens]
    max_new_tokens: int = setting(48)  # of a response, EOS included [tokens]
    temperature: float = setting(1.0)  # of the sampling, and of every log-probability
    # 3. PPO: the loop
    ppo_episodes: int = setting(4_096)  # [responses], in rollouts of
    ppo_rollout_size: int = setting(128)  # [responses], each used for
    ppo_epochs: int = setting(2)  # [passes over the rollout], in
    ppo_minibatch_size: int = setting(64)  # [responses of one step], in pieces of
    ppo_micro_batch_size: int = setting(64, NOTHING)  # [responses at once]
    ppo_lr: float = setting(6e-5)  # peak learning rate, falling linearly to 0
    # Rollouts in which it rises to that: Adam's first steps are its longest
    ppo_warmup: int = setting(4, least=0)
    value_head_lr: float = setting(1e-3)  # of the value head, which starts from zeros
    kl_coef: float = setting(0.1, least=0)  # beta [normalised score per nat of KL]
    kl_target: float = setting(0.0, least=0)  # an adaptive beta's [nats]; 0: none
    kl_horizon: int = setting(10_000)  # how slowly it adapts [responses]
    gamma: float = setting(1.0, least=0, most=1)  # discount
    # GAE: 0 trusts the value head, 1 the sampled return
    gae_lambda: float = setting(0.95, least=0, most=1)
    clip_range: float = setting(0.2)  # of the probability ratio
    value_clip_range: float = setting(1.0)  # of the value [normalised score]
    value_coef: float = setting(0.1, least=0)  # weight of the value loss
    max_grad_norm: float = setting(1.0)
    # Ends an update early [nats per token]; 0: no bound
    max_approx_kl: float = setting(0.2, least=0)
    # Of a response that never ends [normalised score]
    missing_eos_score: float = setting(-2.0, above=-math.inf)
    # 3. PPO: the measurements
    normalise_samples: int = setting(512, least=2)  # SFT responses that fix the scale
    eval_prompts: int = setting(256)  # held-out prompts, before and after [responses]
    # SFT responses to each of them, from which the best possible is estimated
    possible_samples: int = setting(32, ("figures",), least=2)
    # Of them, followed through training; 0: none
    time_machine_prompts: int = setting(6, ("policy",), least=0)
    frontier_rollouts: int = setting(0, NOTHING, least=0)  # at each beta; 0: none
    race_rollouts: int = setting(0, NOTHING, least=0)  # of each estimator; 0: none
    adapter_rollouts: int = setting(0, NOTHING, least=0)  # in each layout; 0: none
    process_rollouts: int = setting(0, NOTHING, least=0)  # by one and by two; 0: none
    # Preferences: pairs to learn from [pairs]; DPO's learning rate and price of KL
    preference_pairs: int = setting(1_000, NOTHING, least=20)
    preference_rollouts: int = setting(24, NOTHING)  # of PPO on the pairs' reward model
    dpo_lr: float = setting(1e-5, NOTHING)  # peak, falling linearly to 0
    dpo_beta: float = setting(0.3, NOTHING)  # [labeller's utility per nat of KL]
    best_of_n: int = setting(16, NOTHING)  # beside these [responses to a prompt]
    checkpoint_every: int = setting(8, NOTHING)  # PPO saves its state [rollouts]
    # Where a run can be watched: tensorboard, wandb or trackio; empty: nowhere else
    log_to: str = setting("", NOTHING)
    # 1: PPO starts although the preflight sees that it would not learn
    train_anyway: int = setting(0, NOTHING, least=0)

    def __post_init__(self):
        for one in dataclasses.fields(self):
            if one.type is not str:
                self._check_range(one, getattr(self, one.name))
        for one, other in (
            ("text_column", "label_column"),
            ("train_split", "validation_split"),
        ):
            if getattr(self, one) == getattr(self, other):
                raise ValueError(
                    f"{one} and {other} are both {getattr(self, one)!r}; "
                    "set one of them to another"
                )
        for name, values in CHOICES.items():
            check_choice(name, getattr(self, name), values)
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

    @staticmethod
    def _check_range(one, value):
        rule = one.metadata
        if not math.isfinite(value):
            raise ValueError(f"{one.name} must be finite, got {value}")
        if rule["most"] < math.inf and not rule["least"] <= value <= rule["most"]:
            bounds = f"from {rule['least']} to {rule['most']}"
            raise ValueError(f"{one.name} must be {bounds}, got {value}")
        if "least" in rule and value < rule["least"]:
            raise ValueError(f"{one.name} must be {rule['least']} or more, got {value}")
        if "above" in rule and value <= rule["above"]:
            raise ValueError(f"{one.name} must be above {rule['above']}, got {value}")

    @property
    def changes(self) -> list[str]:
        """What differs from the preset, each as a text."""
        return [
            f"{name} {value!r} instead of {getattr(PRESETS[self.preset], name)!r}"
            for name, value in dataclasses.asdict(self).items()
            if value != getattr(PRESETS[self.preset], name)
        ]

    def that_change(self, what: str) -> dict:
        """The settings on which one of ALL depends, by name."""
        return {
            one.name: getattr(self, one.name)
            for one in dataclasses.fields(self)
            if what in one.metadata["changes"]
        }

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
    ppo_epochs=4,
    ppo_lr=3e-4,
    ppo_warmup=2,
    value_head_lr=3e-3,
    value_coef=1.0,
    possible_samples=64,
    frontier_rollouts=10,
    race_rollouts=10,
    preference_pairs=2_000,
    preference_rollouts=20,
    dpo_lr=3e-4,
    adapter_rollouts=10,
    process_rollouts=4,
)
PRESETS = {"full": FULL, "tiny": TINY}


def as_written(values: dict) -> dict:
    """Settings from a file, with the defaults of those that did not exist yet."""
    preset = PRESETS.get(values.get("preset"))
    return {**dataclasses.asdict(preset), **values} if preset else values


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
