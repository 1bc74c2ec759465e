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

from utils.lora import AdaptedLayer, add_adapter

LAYOUTS = (0, 1, 2, 3)
# Double quantisation: 4 bits, 8 for the scale of 64 numbers, 32 for that of 256 scales
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
BITS = {"float32": 32, "16 bits": 16, "NF4": NF4_BITS}


def numbers_kept(config) -> int:
    """What a layer keeps of a token for the backward pass, counted with autograd.

    16 numbers for each dimension of GPT-2's states; where the inner layer has a gate,
    as Llama's, 10 for each dimension and 4 for each of the inner layer's; and 8.
    """
    if gated := getattr(config, "intermediate_size", 0):
        return 10 * config.hidden_size + 4 * gated + 8
    return 16 * config.hidden_size + 8


def layout_memory(
    lm: nn.Module, settings, layout: int, rank: int = 16, precision: str = "float32"
) -> dict[str, float]:
    """Bytes of weights, gradients, optimiser and activations: an upper estimate.

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
    rows, new = settings.ppo_micro_batch_size, settings.max_new_tokens
    tokens = settings.prompt_max_tokens + new
    per_token = config.num_hidden_layers * numbers_kept(config) + 4 * config.hidden_size
    if layout:  # what each adapter keeps between its two matrices
        per_token += rank * n_layers
    logits = rows * new * config.vocab_size
    if layout == 0:
        logits += 2 * config.hidden_size * config.vocab_size
    kv = config.num_hidden_layers * 2 * _kv_size(config)
    cache = settings.ppo_rollout_size * tokens * kv * rest
    return {
        "weights": weights + 4 * (adapters + 2 * head),
        "gradients": 4.0 * trained,
        "optimiser": 8.0 * trained,
        "activations": max(cache, rows * tokens * per_token * rest + 4 * logits),
    }


def _numbers(model):
    return sum(p.numel() for p in model.parameters())


def _kv_size(config):
    heads = config.num_attention_heads
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
