"""What must hold before training starts: of what the settings name, and before PPO.

`prepare` begins every notebook; `preflight` checks the very objects that PPO will use.
"""

import copy
import dataclasses
import gc
import os

import psutil
import torch

from utils.data import load_tokenizer, tokens_in_front
from utils.inputs import check_context
from utils.lora import adapter_names, using
from utils.models import load_causal_lm, load_config
from utils.practice import tiny_world
from utils.processes import (
    check_shares,
    divided,
    first_goes_first,
    join,
    n_processes,
)
from utils.rollout import evaluate_responses, in_pieces, response_logprobs
from utils.settings import load_settings, parse_field
from utils.support.learning import ANYWAY, outlook
from utils.support.memory import activation_memory
from utils.support.notebook import (
    how_to_save_memory,
    no_widgets,
    say_errors_in_a_sentence,
)
from utils.support.watching import check_tracker
from utils.training import (
    autocast,
    check_code_is_current,
    default_preset,
    get_device,
    trunk_dtype,
)

GIB = 2**30
HALF_PRECISION_BOUND = 1e-2  # of a first ratio whose trunk was in half precision
# Rounding: 1e-4 nats at most where the logits lie near -100; a wrong result: far more
ROUNDING = 1e-3


def prepare(artefact: str, preset: str = "", changes=()):
    """Settings and device for making an artefact, with all that they name at hand.

    Without a preset it is RLHF_PRESET's, or what the machine can do; `changes` are
    settings by name, and stand above the environment's. Builds the tiny world if it is
    used, sees to it that errors are said in a sentence and that no bar of a library is
    a widget, and prints what is trained on what. Raises ValueError as `load_settings`
    does, if texts of these settings are too long for the model, or if the tokenizer
    knows more words than it, and RuntimeError if a file of `utils` was edited under
    this kernel.
    """
    say_errors_in_a_sentence()
    check_code_is_current()
    no_widgets()
    preset = preset or os.environ.get("RLHF_PRESET") or default_preset()
    settings = load_settings(preset)
    changes = {name: parse_field(name, str(x)) for name, x in dict(changes).items()}
    settings = dataclasses.replace(settings, **changes)
    check_tracker(settings)
    join(settings.device)
    check_shares(n_processes(), settings)
    say_errors_in_a_sentence(how_to_save_memory(settings, artefact))
    with first_goes_first():
        tiny_world.prepare(settings)
    name = settings.model_name
    config, tokenizer = load_config(name).get_text_config(), load_tokenizer(name)
    check_context(config, settings, len(tokens_in_front(tokenizer)))
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer of {name!r} has {len(tokenizer)} tokens and the model only "
            f"{config.vocab_size}; take the tokenizer that belongs to it"
        )
    device = get_device(settings)
    if device.type == "mps":
        device = _trusted(device, settings)
    precision = str(trunk_dtype(settings, device)).removeprefix("torch.")
    print(f"preset: {settings.preset}, on {device} in {precision}")
    print(f"model: {name}, data set: {settings.dataset_name}")
    if settings.changes:
        print(f"changed: {', '.join(settings.changes)}")
    return settings, device


@torch.no_grad()
def device_error(lm, device) -> float:
    """How far a device's log-probabilities are from the CPU's, at most [nats].

    Of four texts that are padded on the left. The model is on the CPU afterwards.
    """
    ids = torch.arange(48).view(4, 12) * 37 % lm.get_input_embeddings().num_embeddings
    mask = (torch.arange(12) >= 2 * torch.arange(4)[:, None]).long()
    found = []
    for place in (device, "cpu"):
        text = ids.to(place), mask.to(place), mask[:, 6:]
        found.append(response_logprobs(lm.to(place), *text).cpu())
    return (found[0] - found[1]).abs().max().item()


def _trusted(device, settings):
    """This device if it computes what the CPU does, else the CPU."""
    off = device_error(load_causal_lm(settings.model_name).eval(), device)
    if off <= ROUNDING:
        return device
    print(
        f"on {device} the log-probabilities are up to {off:.1g} nats off the CPU's, so "
        "this runs on the CPU; another version of PyTorch may do better"
    )
    return torch.device("cpu")


def _dropout(models):
    on = [
        name
        for name, model in models.items()
        if any(module.training for module in model.modules())
    ]
    listed = " and ".join(on)
    return not on, f"training mode is on in the {listed}; call .eval() on it"


def _frozen(models):
    loose = [
        name
        for name in ("reference", "reward model")
        if any(p.requires_grad for p in models[name].parameters())
    ]
    return not loose, f"the {' and '.join(loose)} can be trained; freeze() it"


def _trained(policy):
    """What PPO changes: all weights, or under an adapter those that are not frozen."""
    weights = list(policy.parameters())
    if adapter_names(policy.lm):
        weights = [p for p in weights if p.requires_grad]
    return weights


def _not_shared(models):
    trained = {p.data_ptr() for p in _trained(models["policy"])}
    shared = [
        name
        for name in ("reference", "reward model")
        if any(p.data_ptr() in trained for p in models[name].parameters())
    ]
    listed = " and ".join(shared)
    return not shared, f"the {listed} shares weights with the policy; load it twice"


def _optimised(policy, optimizer):
    groups = optimizer.optimizer.param_groups
    held = {id(p) for group in groups for p in group["params"]}
    with divided(policy):
        wanted = {id(p) for p in _trained(policy)}
    missing, foreign = len(wanted - held), len(held - wanted)
    remedy = (
        f"the optimiser lacks {missing} of the policy's tensors and holds {foreign} "
        "of another model; make policy and optimiser together"
    )
    return held == wanted, remedy


def _ratio(logprobs, rollout, half):
    bound = HALF_PRECISION_BOUND if half else 1e-5
    off = ((logprobs - rollout.old_logprobs).exp() - 1).abs().max().item()
    remedy = (
        f"the first ratio is off by {off:.0e}, more than {bound:.0e}; take old and new "
        "log-probabilities from the same function, with the same model"
    )
    return off <= bound, remedy


def _no_kl(rollout, half):
    bound = HALF_PRECISION_BOUND if half else 1e-5
    kl = (rollout.old_logprobs - rollout.ref_logprobs).abs().max().item()
    remedy = (
        f"a token's log-ratio to the reference is {kl:.0e} before the first step; let "
        "policy and reference start from the same folder"
    )
    return kl <= bound, remedy


def _padding(policy, rollout, settings):
    batch = rollout.rows(torch.arange(min(8, len(rollout))))
    temperature = settings.temperature
    together, _ = evaluate_responses(policy, *batch.texts, temperature)
    worst = 0.0
    for i, real in enumerate(batch.attention_mask.bool()):
        n = int(batch.mask[i].sum())
        text = batch.input_ids[i][real][None]
        everything = torch.ones_like(text)
        alone, _ = evaluate_responses(
            policy, text, everything, everything[:, -n:], temperature
        )
        worst = max(worst, (alone[0] - together[i, :n]).abs().max().item())
    remedy = (
        f"a padded text and the text alone differ by {worst:.0e} nats; let "
        "the position ids follow the attention mask"
    )
    return worst <= ROUNDING, remedy


def _one_eos(rollout, tokenizer, max_new_tokens):
    eos, width = tokenizer.eos_token_id, rollout.mask.shape[1]
    # What the tokenizer puts in front of every text may be EOS, too
    front = len(tokens_in_front(tokenizer))
    counted = rollout.attention_mask.cumsum(dim=1) * rollout.attention_mask
    found = (rollout.input_ids == eos) & (counted > front)
    in_prompt, in_response = found[:, :-width].any(), found[:, -width:]
    last = rollout.mask.cumsum(dim=1) == rollout.mask.sum(dim=1, keepdim=True)
    cut_off = rollout.mask.bool().all(dim=1) & (width == max_new_tokens)
    ends = (in_response & last).any(dim=1) | cut_off
    good = not in_prompt and ends.all() and not (in_response & ~last).any()
    remedy = (
        f"EOS (id {eos}) must close a response, once, and stand nowhere else; check "
        "the tokenizer, the prompts and the mask of the responses"
    )
    return bool(good), remedy


def _base(policy, reference, rollout, settings):
    """Whether the reference is the policy's base to the last bit, all adapters off."""
    size, temperature = settings.ppo_micro_batch_size, settings.temperature

    def read(lm):
        def logprobs(*texts):
            return response_logprobs(lm, *texts, temperature)

        return in_pieces(logprobs, size, *rollout.texts)

    with using(policy.lm, None):
        off = (read(policy.lm) - read(reference)).abs().max().item()
    remedy = (
        f"with its adapters off the policy is up to {off:.0e} nats off the reference; "
        "merge what was trained before PPO into the base, and let the reference be "
        "sharing(lm, None)"
    )
    return off == 0, remedy


def _frozen_base(policy):
    """Whether of the policy's language model only adapters can be trained."""
    names = [n for n, p in policy.lm.named_parameters() if p.requires_grad]
    loose = [name for name in names if ".adapters." not in name]
    if loose:
        return False, f"{loose[0]} of the base can be trained; freeze it"
    of = {name.split(".adapters.")[1].split(".")[0] for name in names}
    remedy = (
        f"{' and '.join(sorted(of)) or 'no adapter'} can be trained in the policy; "
        "let that be one adapter, which is on"
    )
    on = {m.on for m in policy.lm.modules() if hasattr(m, "adapters")} - {None}
    return len(of) == 1 and on == of, remedy


def _reward_adapter(policy, reward_model, rollout, settings):
    """Whether scores are read under the adapter that the reward model was made with."""
    shared = {p.data_ptr() for p in policy.lm.parameters() if not p.requires_grad}
    trunk = reward_model.trunk
    layers = [m for m in trunk.modules() if hasattr(m, "adapters")]
    if any(p.data_ptr() in shared for p in trunk.parameters()):
        on = {layer.on for layer in layers} - {None}
        if not on:
            return False, (
                "the reward model stands on the policy's base and no adapter of its "
                'own is on; take the trunk of sharing(lm, "reward")'
            )
    again = in_pieces(
        reward_model,
        settings.ppo_micro_batch_size,
        rollout.input_ids,
        rollout.attention_mask,
    )
    off = (again - rollout.raw_scores).abs().max().item()
    # Another adapter changes logits far more than half precision does
    bound = HALF_PRECISION_BOUND * max(1.0, again.abs().max().item())
    return off <= bound, (
        f"a score of the rollout is {off:.0e} off what the reward model says of the "
        "same text; let it be read under the reward adapter"
    )


def _of_adapters(policy, reference, reward_model, rollout, settings):
    """What holds besides, where the policy is an adapter on a frozen base."""
    if not adapter_names(policy.lm):
        return {}
    with autocast(settings, rollout.mask.device):
        same = _base(policy, reference, rollout, settings)
        scored = _reward_adapter(policy, reward_model, rollout, settings)
    return {
        "of the base nothing can be trained": _frozen_base(policy),
        "the reference is the base, exactly": same,
        "scores are read under the reward model's adapter": scored,
    }


def _device(policy, device):
    off = device_error(copy.deepcopy(policy.lm), device)
    remedy = (
        f"on {device} the log-probabilities are up to {off:.1g} nats off the CPU's; "
        "set device to cpu and run again from the first cell"
    )
    return off <= ROUNDING, remedy


def memory_needed(policy, settings) -> float:
    """What PPO needs beside the loaded models, in bytes: an estimate from above.

    A gradient and AdamW's two moments for each weight that is trained, in 4 bytes, and
    what `activation_memory` says.
    """
    layers = [m for m in policy.lm.modules() if getattr(m, "on", None)]
    ranks = sum(layer.adapters[layer.on].rank for layer in layers)
    weights = sum(p.numel() for p in _trained(policy))
    return 12 * weights + activation_memory(policy.lm.config, settings, ranks)


def memory_free(device: torch.device) -> int:
    """Bytes that are still free on the GPU, or in the machine's memory."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def _memory(policy, settings, device):
    needed, free = memory_needed(policy, settings) / GIB, memory_free(device) / GIB
    found = f"about {needed:.2f} GiB needed, {free:.1f} GiB free"
    remedy = f"{found}; lower ppo_micro_batch_size ({settings.ppo_micro_batch_size})"
    return needed <= free, f"{remedy} or ppo_rollout_size", found


def _tell(results):
    """Print a line for each result; returns the remedies of those that failed."""
    marks = {True: "✓", False: "✗", None: "–"}
    for name, (good, remedy) in results.items():
        print(marks[good], name if good else remedy)
    return [remedy for good, remedy in results.values() if good is False]


@torch.no_grad()
def preflight(
    policy,
    reference,
    reward_model,
    optimizer,
    rollout,
    tokenizer,
    settings,
    sft_responses,
    reward_folder,
):
    """Check what PPO takes for granted; one line each, a tick or what to do.

    `rollout` is a first one of the untrained policy; see `outlook` for the last two.
    Raises RuntimeError, with all that failed, if anything did; with `train_anyway` not
    for what only keeps PPO from learning.
    """
    gc.collect()  # an earlier policy and its optimiser refer to each other
    device, temperature = rollout.mask.device, settings.temperature
    half = trunk_dtype(settings, device) != torch.float32
    with autocast(settings, device):
        logprobs, _ = in_pieces(
            lambda *texts: evaluate_responses(policy, *texts, temperature),
            settings.ppo_micro_batch_size,
            *rollout.texts,
        )
    models = {"policy": policy, "reference": reference, "reward model": reward_model}
    enough, lower, found = _memory(policy, settings, device)
    results = {
        "dropout is off in all models": _dropout(models),
        "reference and reward model are frozen": _frozen(models),
        "neither shares weights with the policy": _not_shared(models),
        "the optimiser holds the policy's weights": _optimised(policy, optimizer),
        "the first ratio is 1": _ratio(logprobs, rollout, half),
        "the KL to the reference is 0": _no_kl(rollout, half),
        "padding on the left changes nothing": _padding(policy, rollout, settings),
        "EOS closes a response, and only that": _one_eos(
            rollout, tokenizer, settings.max_new_tokens
        ),
        f"there is enough memory ({found})": (enough, lower),
        **_of_adapters(policy, reference, reward_model, rollout, settings),
    }
    if device.type == "mps":
        results["the device computes what the CPU does"] = _device(policy, device)
    eos_id = tokenizer.eos_token_id
    wrong = _tell(results)
    hopeless = _tell(outlook(sft_responses, reward_folder, eos_id, settings))
    if wrong:
        raise RuntimeError("PPO would go wrong: " + "; ".join(wrong + hopeless))
    if hopeless and not settings.train_anyway:
        raise RuntimeError("PPO would not learn: " + "; ".join([*hopeless, ANYWAY]))
    if hopeless:
        print("PPO starts all the same, since train_anyway is set")


def check_group(name: str, group_size: int, known, settings):
    """ValueError if an estimator cannot be trained with groups of this size.

    `known` are the names of the estimators there are. The responses of a group are
    compared with each other, so a rollout must be made of whole groups; those without
    comparison take a group of 1.
    """
    if name not in known:
        raise ValueError(f"there is no estimator {name!r}; take {' or '.join(known)}")
    if name in ("RLOO", "GRPO") and group_size < 2:
        raise ValueError(
            f"{name} compares responses to the same prompt, so a group must be 2 or "
            f"more, got {group_size}"
        )
    if group_size < 1 or settings.ppo_rollout_size % group_size:
        raise ValueError(
            f"ppo_rollout_size ({settings.ppo_rollout_size}) must be a multiple of the "
            f"group, got {group_size}"
        )
    pieces = settings.ppo_micro_batch_size < settings.ppo_minibatch_size
    if name == "GRPO" and pieces:
        raise ValueError(
            "GRPO's mean over responses cannot be worked out in pieces; set "
            f"ppo_micro_batch_size ({settings.ppo_micro_batch_size}) to "
            f"ppo_minibatch_size ({settings.ppo_minibatch_size}), or lower both"
        )
