import dataclasses

import pytest

from utils.settings import ALL, FULL, TINY, Settings, as_written, load_settings


def test_the_presets():
    assert load_settings("full", {}) == FULL
    assert load_settings("tiny", {}) == TINY
    assert (FULL.model_name, FULL.dataset_name) == ("gpt2", "stanfordnlp/sst2")
    assert FULL.ppo_steps * FULL.ppo_rollout_size == FULL.ppo_episodes


WORDS = {"precision": "float16", "device": "cpu", "log_to": "wandb"}


def test_every_field_can_be_set_from_the_environment():
    for field in dataclasses.fields(Settings):
        value = getattr(FULL, field.name)
        if field.name == "preset":
            continue
        if field.name in WORDS:
            other = WORDS[field.name]
        elif field.name == "ppo_micro_batch_size":
            other = value // 2
        elif field.name in ("sft_warmup", "gamma", "gae_lambda"):
            other = value / 2
        else:
            other = value * 2 if value else field.type(3)
        changed = load_settings("full", {f"RLHF_{field.name.upper()}": str(other)})
        assert getattr(changed, field.name) == other != value
        assert type(getattr(changed, field.name)) is type(value)


@pytest.mark.parametrize(
    "variable, text, message",
    [
        ("RLHF_PPO_EPISODE", "512", "RLHF_PPO_EPISODE.*'ppo_episodes'"),
        ("RLHF_PPO_EPISODES", "many", "ppo_episodes must be a whole number.*'many'"),
        ("RLHF_PPO_EPISODES", "51.2", "ppo_episodes must be a whole number.*'51.2'"),
        ("RLHF_KL_COEF", "low", "kl_coef must be a number.*'low'"),
        (
            "RLHF_PPO_EPISODES",
            "100",
            r"ppo_episodes \(100\) must be a multiple of ppo_",
        ),
        ("RLHF_PPO_LR", "0", "ppo_lr must be above 0.*0"),
        ("RLHF_PPO_LR", "inf", "ppo_lr must be finite.*inf"),
        ("RLHF_PPO_LR", "nan", "ppo_lr must be finite.*nan"),
        ("RLHF_MISSING_EOS_SCORE", "nan", "missing_eos_score must be finite"),
        ("RLHF_KL_COEF", "-1", "kl_coef must be 0 or more.*-1"),
        ("RLHF_GAE_LAMBDA", "1.5", "gae_lambda must be from 0 to 1.*1.5"),
        ("RLHF_PROMPT_MAX_TOKENS", "1", "prompt_max_tokens.*prompt_min_tokens"),
        ("RLHF_PRECISION", "int8", "precision.*'int8'"),
        ("RLHF_DEVICE", "gpu", "device must be auto, cpu, cuda or mps, got 'gpu'"),
        ("RLHF_LOG_TO", "wandbs", "log_to must be empty, tensorboard, wandb or track"),
        ("RLHF_DEVICE", "cuda:1", "device must be auto, cpu, .*'cuda:1'"),
        ("RLHF_PRESETS", "1", "RLHF_PRESETS.*there is no setting 'presets'"),
        ("RLHF_MAX_TOKENS", "1", "max_tokens must be 2 or more.*1"),
    ],
)
@pytest.mark.faults
def test_bad_values_are_named(survived, variable, text, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_settings("full", {variable: text})
    assert "\n" not in str(caught.value)
    survived(f"setting {variable}={text}", str(caught.value))


def test_an_adaptive_beta_cannot_start_at_zero():
    with pytest.raises(ValueError, match="kl_target is 6.0 but kl_coef is 0"):
        load_settings("full", {"RLHF_KL_TARGET": "6", "RLHF_KL_COEF": "0"})


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match="'tyni'.*'tiny'"):
        load_settings("tyni", {})


def test_what_a_setting_changes_is_said_once_for_each():
    """What artefacts, runs and expected figures depend on, in one place."""
    kinds = {name: set(TINY.that_change(name)) for name in ALL}
    common = {"preset", "model_name", "dataset_name", "seed", "max_tokens"}
    common |= {"dataset_config", "text_column", "label_column", "positive_label"}
    common |= {"negative_label", "train_split", "validation_split", "validation_share"}
    common |= {"train_rows"}
    fields = {field.name for field in dataclasses.fields(Settings)}
    sft = {name for name in fields if name.startswith("sft_")}
    rm = {name for name in fields if name.startswith("rm_")}
    free = {"runs_dir", "ppo_micro_batch_size", "frontier_rollouts", "best_of_n"}
    free |= {"checkpoint_every", "device", "train_anyway", "race_rollouts", "log_to"}
    free |= {"preference_pairs", "preference_rollouts", "dpo_lr", "dpo_beta"}
    free |= {"adapter_rollouts", "process_rollouts"}
    assert kinds["sft"] == common | sft
    assert kinds["reward_model"] == common | rm
    assert kinds["policy"] == fields - sft - rm - free - {"possible_samples"}
    assert kinds["figures"] == fields - free - {"seed", "time_machine_prompts"}
    assert TINY.that_change("sft")["sft_lr"] == TINY.sft_lr


def test_what_differs_from_the_preset_is_said():
    assert TINY.changes == [] == FULL.changes
    changed = dataclasses.replace(TINY, kl_coef=0.2, seed=7)
    assert changed.changes == ["seed 7 instead of 42", "kl_coef 0.2 instead of 0.1"]


def test_a_setting_that_did_not_exist_yet_was_at_its_default():
    """What was made before is still taken up, and only with the defaults."""
    then = {"preset": "tiny", "kl_coef": 0.3}
    assert as_written(then) == dataclasses.asdict(
        dataclasses.replace(TINY, kl_coef=0.3)
    )
    assert as_written({"kl_coef": 0.3}) == {"kl_coef": 0.3}  # of what preset?
