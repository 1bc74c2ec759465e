"""The same numbers in less time: what `ppo.py` and `models.py` say plainly.

Each function names the plain version that it equals; `tests/test_fast.py` holds the
two together. Nobody has to read this file to understand PPO.
"""

import functools
import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.ppo import at_least_float32, check_shapes

GROUP = 32  # texts that run through the trunk together, where lengths differ much
DRAWS = 64  # hidden states whose logits are made at once: they stay in a CPU's cache


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels):
        logits = torch.mm(weight, hidden.t())  # (V, N): faster than (N, V) on a CPU
        chosen = logits.gather(0, labels.unsqueeze(0)).squeeze(0)
        highest = logits.amax(dim=0)
        exps = logits.sub_(highest).exp_()  # in place: the only (V, N) tensor
        total = exps.sum(dim=0)
        ctx.save_for_backward(hidden, weight, labels, exps, total)
        return chosen - highest - total.log()

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, labels, exps, total = ctx.saved_tensors
        grad, scale = grad.unsqueeze(1), (-grad / total).unsqueeze(1)
        # p = exps / total, and the division is made where it is small: (N, d)
        grad_hidden = grad * weight[labels] + scale * torch.mm(exps.t(), weight)
        grad_weight = None
        if ctx.needs_input_grad[1]:  # not under an adapter: the weight is frozen
            grad_weight = torch.mm(exps, scale * hidden)
            grad_weight.index_add_(0, labels, grad * hidden)
        return grad_hidden, grad_weight, None


def linear_logprobs(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float = 1.0
) -> Tensor:
    """`token_logprobs(hidden @ weight.T, labels, temperature)`, and its gradients.

    hidden (N, d), weight (V, d), labels (N,) -> (N,), in nats. With z = W h and
    p = softmax(z),

    d log p_label / d h = W_label - p W,  d log p_label / d W_v = (1[v = label] - p_v) h

    so all that the backward pass needs is exp(z - max z), which the forward pass
    leaves behind in the place of z. Automatic differentiation would keep log p, fill a
    (N, V) tensor with zeros for the gradient of `gather`, and a third for that of
    log p; with 50,257 words that takes as long as the arithmetic. The idea, without
    even the one tensor: Wijmans et al. 2024 (arXiv 2411.09009). Raises ValueError if
    the shapes disagree or the temperature is not positive.
    """
    check_shapes(**{"hidden without d": hidden[:, 0], "labels": labels})
    check_shapes(**{"a row of hidden": hidden[:1], "a row of weight": weight[:1]})
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    with torch.autocast(hidden.device.type, enabled=False):
        weight = at_least_float32(weight)
        hidden = hidden.to(weight.dtype) / temperature
        return _LinearLogprobs.apply(hidden, weight, labels)


def draw_tokens(
    hidden: Tensor,
    weight: Tensor,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`torch.multinomial(softmax(hidden @ weight.T / temperature), 1)`, with its odds.

    hidden (N, d), weight (V, d) -> tokens (N,). The probabilities stand end to end on
    a line of length 1; where a random number falls, there is the token. `multinomial`
    draws a random number for each word of the vocabulary instead, which takes a CPU
    longer than the projection. A hidden state that is not a number draws the last
    word.
    """
    tokens = []
    for rows in hidden.split(DRAWS):
        with torch.autocast(hidden.device.type, enabled=False):
            # Without names, so that each (N, V) tensor's memory is free for the next
            probs = torch.softmax(
                F.linear(rows.to(weight.dtype), weight) / temperature, dim=-1
            )
        places = random_places(len(rows), probs.device, generator)
        ends = probs.to(places.device).cumsum(dim=-1, dtype=places.dtype)
        found = torch.searchsorted(ends, places * ends[:, -1:], right=True)
        # Of a row of NaN it finds V, one behind the last word
        tokens.append(found.clamp(max=len(weight) - 1))
    return torch.cat(tokens).squeeze(1).to(hidden.device)


def random_places(n: int, device, generator=None) -> Tensor:
    """`torch.rand((n, 1), dtype=torch.float64)`, on the CPU if the device is a Mac's.

    Its GPU has no float64, so two numbers of 24 bits make one of 48.
    """
    if device.type != "mps":
        options = {"dtype": torch.float64, "device": device}
        return torch.rand((n, 1), generator=generator, **options)
    high, low = torch.rand((2, n, 1), device=device, generator=generator).cpu().double()
    return high + low * 2**-24


def send(x: Tensor, device) -> Tensor:
    """`x.to(device)`, without a wait if it is CUDA, which is known to do that right."""
    return x.to(device, non_blocking=torch.device(device).type == "cuda")


def takes_positions(trunk: nn.Module) -> bool:
    """Whether it can be told positions: BLOOM and MPT count them from the mask."""
    return "position_ids" in arguments_of(type(trunk).forward)


@functools.cache
def arguments_of(function) -> frozenset:
    """The names of what a function takes."""
    return frozenset(inspect.signature(function).parameters)


def hidden_states_by_length(
    trunk: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    position_ids: Tensor,
    ends: Tensor,
) -> Tensor:
    """`hidden_states(trunk, input_ids, attention_mask)` with little padding.

    All (B, L) -> (B, L, d). Texts of like length run through the trunk together, GROUP
    at a time, up to the end of the longest; what lies behind it is 0. `ends` (B,) says
    where each text ends; in the CPU's memory, it costs no wait for a GPU.
    """
    length, device = input_ids.shape[1], input_ids.device
    # Looked up once for all texts: the gradient of each look-up is a whole (V, d)
    # tensor, so one for each group would cost that again and again.
    embedded = trunk.get_input_embeddings()(input_ids)
    order, states = ends.argsort(), []
    for group in order.split(GROUP):
        end = int(ends[group[-1]])
        group = send(group, device)
        positions = {}
        if takes_positions(trunk):
            positions["position_ids"] = position_ids[group, :end]
        output = trunk(
            inputs_embeds=embedded[group, :end],
            attention_mask=attention_mask[group, :end],
            use_cache=False,
            **positions,
        )
        states.append(F.pad(output.last_hidden_state, (0, 0, 0, length - end)))
    return torch.cat(states)[send(order.argsort(), device)]
