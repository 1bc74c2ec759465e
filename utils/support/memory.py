"""What PPO keeps in memory, in each layout of its models: worked out, and counted.

Layout 0 is full fine-tuning: policy, reference and reward model are three models. With
adapters, of which all but the reference have one: 1, two bases, for policy and reward
model; 2, one base for all three; 3, one base for policy and reference, beside a reward
model that is whole.
"""

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from utils.fast import DRAWS
from utils.lora import AdaptedLayer, add_adapter

LAYOUTS = (0, 1, 2, 3)
# Double quantisation: 4 bits, 8 for the scale of 64 numbers, 32 for that of 256 scales
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
BITS = {"float32": 32, "16 bits": 16, "NF4": NF4_BITS}


def numbers_kept(config, adapters: bool = False) -> int:
    """What a layer keeps of a token for the backward pass, counted with autograd.

    16 numbers for each dimension of GPT-2's states; where the inner layer has a gate,
    as Llama's, 10 for each dimension (8 where its norms are frozen) and 4 for each of
    the inner layer's; and 8.
    """
    if gated := getattr(config, "intermediate_size", 0):
        return (8 if adapters else 10) * config.hidden_size + 4 * gated + 8
    return 16 * config.hidden_size + 8


def numbers_at_once(config, adapters: bool) -> int:
    """What a layer holds of a token at once where it keeps nothing, likewise counted.

    Its inner layer, before and after the activation function, and states; an adapter's
    output stands beside the layer's until they are added.
    """
    size = config.hidden_size
    if gated := getattr(config, "intermediate_size", 0):
        return (4 if adapters else 3) * gated + 4 * size
    return (18 if adapters else 14) * size


def activation_memory(config, settings, adapters: int = 0, width: int = 4) -> float:
    """Bytes that PPO needs beside weights, gradients and optimiser, at the worst.

    That is the most of three moments: when a rollout is sampled, when its texts are
    scored all together, and in the update of a micro-batch. `adapters` is the sum of
    the ranks of those that are on, 0 in full fine-tuning, where the vocabulary's
    gradient is added to the one that is there; `width` is the bytes of a state.
    """
    size, layers = config.hidden_size, config.num_hidden_layers
    tokens = settings.prompt_max_tokens + settings.max_new_tokens
    texts, rows = settings.ppo_rollout_size, settings.ppo_micro_batch_size
    vocabulary = 4 * config.vocab_size
    sampling = texts * tokens * layers * 2 * _kv_size(config) * width
    sampling += 3 * min(DRAWS, texts) * vocabulary
    scoring = texts * tokens * numbers_at_once(config, bool(adapters)) * width
    kept = layers * numbers_kept(config, bool(adapters)) + adapters + 4 * size
    update = rows * tokens * kept * width
    update += (rows * settings.max_new_tokens + (0 if adapters else size)) * vocabulary
    return max(sampling, scoring, update)


def layout_memory(
    lm: nn.Module, settings, layout: int, rank: int = 16, precision: str = "float32"
) -> dict[str, float]:
    """Bytes of weights, gradients, optimiser and activations, at the peak.

    Worked out; peaks that were measured are within 15 % (`python -m tools.peaks`).

    `lm` is a language model, which may lie on the device "meta", where it takes no
    memory itself. `precision` is that of frozen weights: "float32", "16 bits" or "NF4"
    (the linear layers; the rest in 16 bits). What is trained has 4 bytes, and so have
    its gradient and AdamW's two moments; activations have 2 below float32. Raises
    ValueError for a layout or a precision that there is not.
    """
    if layout not in LAYOUTS or precision not in BITS:
        raise ValueError(
            f"there is no layout {layout} in {precision!r}; take one of {LAYOUTS} and "
            f"one of {', '.join(BITS)}"
        )
    whole, trunk = _numbers(lm), _numbers(lm.base_model)
    linear, adapter, n_layers = _adapter_numbers(lm, rank)
    config, head = lm.config, lm.config.hidden_size + 1
    rest = 2 if BITS[precision] < 32 else 4

    def frozen(numbers):
        return linear * BITS[precision] / 8 + (numbers - linear) * rest

    if layout == 0:
        trained, adapters = whole + head, 0
        weights = 4 * whole + frozen(whole) + frozen(trunk)
    else:
        adapters = adapter if layout == 3 else 2 * adapter
        trained = adapter + head
        weights = frozen(whole) + (0 if layout == 2 else frozen(trunk))
    ranks = rank * n_layers if layout else 0
    return {
        "weights": weights + 4 * (adapters + 2 * head),
        "gradients": 4.0 * trained,
        "optimiser": 8.0 * trained,
        "activations": activation_memory(config, settings, ranks, rest),
    }


def _numbers(model):
    return sum(p.numel() for p in model.parameters())


def _kv_size(config):
    heads = getattr(config, "num_attention_heads", 1)
    groups = getattr(config, "num_key_value_heads", None) or heads
    return config.hidden_size * groups // heads


def _adapter_numbers(lm, rank):
    """The numbers in the layers that get an adapter, in that adapter, and how many."""
    tensors = (*lm.parameters(), *lm.buffers())
    twin = copy.deepcopy(lm, {id(x): x for x in tensors})
    trainable = [(p, p.requires_grad) for p in lm.parameters()]
    add_adapter(twin, "counted", rank)
    for parameter, before in trainable:  # they are the model's own
        parameter.requires_grad_(before)
    layers = [m for m in twin.modules() if isinstance(m, AdaptedLayer)]
    linear = sum(layer.base.weight.numel() for layer in layers)
    numbers = sum(_numbers(layer.adapters["counted"]) for layer in layers)
    return linear, numbers, len(layers)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """What these tensors take, each piece of memory counted once."""
    places = {}
    for x in tensors:
        storage = x.untyped_storage()
        places[storage.data_ptr()] = storage.nbytes()
    return sum(places.values())


def counted_memory(models: Iterable[nn.Module], optimizer, loss: Callable) -> dict:
    """Bytes of weights, gradients, optimiser and activations, as they really are.

    `models` are all that PPO holds, and may share weights; `loss()` is worked out with
    what the policy keeps for its backward pass counted, and one step is taken along it.
    """
    models = list(models)
    weights = [p for model in models for p in model.parameters()]
    held = {p.untyped_storage().data_ptr() for p in weights}
    kept = []

    def keep(tensor):
        kept.append(tensor)  # so that no address is used twice
        return tensor

    optimizer.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = loss()
    activations = [x for x in kept if x.untyped_storage().data_ptr() not in held]
    found = {"weights": bytes_of(weights)}
    optimizer.backward(value)
    optimizer.step(loss=value)
    states = optimizer.optimizer.state.values()
    found["gradients"] = bytes_of(p.grad for p in weights if p.grad is not None)
    found["optimiser"] = bytes_of(
        x for state in states for x in state.values() if x.dim()
    )
    return {**found, "activations": bytes_of(activations)}


def peak_of(function: Callable) -> int:
    """The most bytes that a call holds at once beside what was there, on the CPU.

    Whatever PyTorch allocates, temporary or not, by its profiler.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as found:
        function()
    events = [e for e in found.profiler.kineto_results.events() if e.nbytes()]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
