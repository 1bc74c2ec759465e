"""What PPO keeps in memory, in each layout of its models: worked out, and counted.

Layout 0 is full fine-tuning: policy, reference and reward model are three models. With
adapters, of which all but the reference have one: 1, two bases, for policy and reward
model; 2, one base for all three; 3, one base for policy and reference, beside a reward
model that is whole.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from more.lora import linear_layers, sizes

LAYOUTS = (0, 1, 2, 3)
# Double quantisation: 4 bits, 8 for the scale of 64 numbers, 32 for that of 256 scales
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
BITS = {"float32": 32, "16 bits": 16, "NF4": NF4_BITS}


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
    heads = getattr(config, "num_attention_heads", 1)
    keys = size * (getattr(config, "num_key_value_heads", None) or heads) // heads
    # What a layer keeps of a token for the backward pass, counted with autograd, and
    # what it holds at once where it keeps nothing. Llama's inner layer has a gate, and
    # an adapter's output stands beside the layer's until they are added
    if gated := getattr(config, "intermediate_size", 0):
        kept = (8 if adapters else 10) * size + 4 * gated + 8
        at_once = (4 if adapters else 3) * gated + 4 * size
    else:
        kept, at_once = 16 * size + 8, (18 if adapters else 14) * size
    sampling = texts * (tokens * layers * 2 * keys * width + 3 * vocabulary)
    scoring = texts * tokens * at_once * width
    update = rows * tokens * (layers * kept + adapters + 4 * size) * width
    update += (rows * settings.max_new_tokens + (0 if adapters else size)) * vocabulary
    return max(sampling, scoring, update)


def layout_memory(
    lm: nn.Module, settings, layout: int, rank: int = 16, precision: str = "float32"
) -> dict[str, float]:
    """Bytes of weights, gradients, optimiser and activations, at the peak.

    Worked out; peaks that were measured are within 15 % (docs/peaks.json).

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
    whole, trunk = (sum(p.numel() for p in x.parameters()) for x in (lm, lm.base_model))
    layers, head = linear_layers(lm).values(), lm.config.hidden_size + 1
    linear = sum(layer.weight.numel() for layer in layers)
    adapter = rank * sum(sum(sizes(layer)) for layer in layers)
    rest = 2 if BITS[precision] < 32 else 4

    def frozen(numbers):
        return linear * BITS[precision] / 8 + (numbers - linear) * rest

    if layout == 0:
        trained, adapters = whole + head, 0
        weights = 4 * whole + frozen(whole) + frozen(trunk)
    else:
        trained, adapters = adapter + head, adapter if layout == 3 else 2 * adapter
        weights = frozen(whole) + (0 if layout == 2 else frozen(trunk))
    ranks = rank * len(layers) if layout else 0
    return {
        "weights": weights + 4 * (adapters + 2 * head),
        "gradients": 4.0 * trained,
        "optimiser": 8.0 * trained,
        "activations": activation_memory(lm.config, settings, ranks, rest),
    }


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """What these tensors take, each piece of memory counted once."""
    pieces = [x.untyped_storage() for x in tensors]
    return sum({piece.data_ptr(): piece.nbytes() for piece in pieces}.values())


def counted_memory(models: Iterable[nn.Module], optimizer, loss: Callable) -> dict:
    """Bytes of weights, gradients, optimiser and activations, as they really are.

    `models` are all that PPO holds, and may share weights; `loss()` is worked out with
    what the policy keeps for its backward pass counted, and one step is taken along it.
    """
    weights = [p for model in models for p in model.parameters()]
    held = {p.untyped_storage().data_ptr() for p in weights}
    kept = []  # the tensors, so that no address is used twice
    optimizer.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x) or x, lambda x: x
    ):
        value = loss()
    activations = [x for x in kept if x.untyped_storage().data_ptr() not in held]
    optimizer.backward(value)
    optimizer.step(loss=value)
    states = optimizer.optimizer.state.values()
    moments = [x for state in states for x in state.values() if x.dim()]
    return {
        "weights": bytes_of(weights),
        "gradients": bytes_of(p.grad for p in weights if p.grad is not None),
        "optimiser": bytes_of(moments),
        "activations": bytes_of(activations),
    }
