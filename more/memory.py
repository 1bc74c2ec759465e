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

# Double quantisation: 4 bits, 8 for the scale of 64 numbers, 32 for that of 256 scales
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
BITS = {"float32": 32, "16 bits": 16, "NF4": NF4_BITS}


def layout_memory(
    lm: nn.Module, layout: int, rank: int = 16, precision: str = "float32"
) -> dict[str, float]:
    """Bytes of weights, gradients and optimiser: what lasts through PPO's training.

    `lm` is a language model, which may lie on the device "meta", where it takes no
    memory itself. `precision` is that of frozen weights: "float32", "16 bits" or "NF4"
    (the linear layers; the rest in 16 bits). What is trained has 4 bytes, and so have
    its gradient and AdamW's two moments.
    """
    whole, trunk = (sum(p.numel() for p in x.parameters()) for x in (lm, lm.base_model))
    layers, head = linear_layers(lm).values(), lm.config.hidden_size + 1
    linear = sum(layer.weight.numel() for layer in layers)
    adapter = rank * sum(sum(sizes(layer)) for layer in layers)

    def frozen(numbers):
        rest = 2 if BITS[precision] < 32 else 4
        return linear * BITS[precision] / 8 + (numbers - linear) * rest

    if layout == 0:
        trained, adapters = whole + head, 0
        weights = 4 * whole + frozen(whole) + frozen(trunk)
    else:
        trained, adapters = adapter + head, adapter if layout == 3 else 2 * adapter
        weights = frozen(whole) + (0 if layout == 2 else frozen(trunk))
    return {
        "weights": weights + 4 * (adapters + 2 * head),
        "gradients": 4.0 * trained,
        "optimiser": 8.0 * trained,
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
