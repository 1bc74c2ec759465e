"""The models of the three stages: a trunk with a head for each job."""

import contextlib
import inspect
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache

from utils.data import innermost, loading
from utils.ppo import at_least_float32, check_shapes


class _TextBar(tqdm):
    """The hub's progress bar as plain text: its own is a widget, or red in a page."""

    def __init__(self, *args, name=None, **options):
        super().__init__(*args, **options | {"desc": "Download", "file": sys.stdout})


def read_model(kind, name: str, **options):
    """The model `name` as the library class `kind` reads it, in float32.

    float32 weights also where the trunk computes in half precision: the optimiser's
    small steps would be lost in the rounding of half-precision weights. GPT-2's
    `gelu_new` takes eight steps, each of which keeps its result for the backward pass;
    `gelu_pytorch_tanh` is the same function in one.
    """
    with loading("model", name):
        config = AutoConfig.from_pretrained(name)
        if getattr(config, "activation_function", None) == "gelu_new":
            config.activation_function = "gelu_pytorch_tanh"
        if not Path(name).is_dir() and not hasattr(config, "quantization_config"):
            with contextlib.suppress(EntryNotFoundError):  # it is in several files
                hf_hub_download(name, "model.safetensors", tqdm_class=_TextBar)
        options |= {"config": config, "dtype": torch.float32, "use_safetensors": True}
        model = kind.from_pretrained(name, **options)
    for tensor in (*model.parameters(), *model.buffers()):
        # Windows refuses to replace a file while weights are mapped to it
        tensor.data = tensor.data.clone()
    return model


def load_causal_lm(name: str, device="cpu"):
    """The language model `name` (on the hub, or a local folder) in float32.

    Raises OSError if it cannot be loaded, ValueError if `check_lm` refuses it.
    """
    lm = read_model(AutoModelForCausalLM, name)
    check_lm(lm, name)
    lm = lm.to(device)
    lm.tie_weights()  # to some devices (XLA, NPU) it goes untied, without a word
    return lm


@torch.no_grad()
def check_lm(lm: nn.Module, name: str):
    """Raise ValueError unless a model's own logits are those that we compute.

    Ours are a plain projection of the hidden states, here with padding on the left and
    a cache for the first half of the text. Models that scale or cap their logits, add a
    bias, or let a token see later ones differ, and are refused.
    """
    ids, cache = torch.tensor([[0, 1, 2, 1, 0, 2]]), DynamicCache(config=lm.config)
    padded, mask = F.pad(ids, (3, 0), value=3), F.pad(torch.ones_like(ids), (3, 0))
    try:
        theirs = lm(input_ids=ids).logits[:, 3:].log_softmax(dim=-1)
        hidden_states(lm.base_model, padded[:, :6], mask[:, :6], cache)
        hidden = hidden_states(lm.base_model, padded[:, 6:], mask, cache)
        off = (vocabulary_logits(lm, hidden).log_softmax(dim=-1) - theirs).abs().max()
        same = off <= 1e-3 * theirs.abs().max()
        fault = "" if same else f"its logits differ by {off:.2g}"
    except Exception as error:
        fault = innermost(error)
    if fault:
        raise ValueError(
            f"{name!r} cannot be read as GPT-2's or Llama's kind is, cached, behind "
            f"padding ({fault}); make it anew, or name another, such as 'gpt2'"
        )


def freeze(model: nn.Module) -> nn.Module:
    """The model without dropout and without gradients."""
    return model.eval().requires_grad_(False)


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions that count real tokens only: (B, L) -> (B, L).

    GPT-2's position embeddings are absolute, so without this a left-padded sentence
    would be read as if it began in the middle of a text.
    """
    return (attention_mask.cumsum(dim=-1) - 1).clamp(min=0)


def hidden_states(trunk, input_ids, attention_mask, cache=None) -> Tensor:
    """The trunk's last hidden states (B, N, d) for the last N tokens of a text.

    input_ids (B, N), attention_mask (B, L). The cache remembers the L - N tokens before
    them; without one, N is L.
    """
    known = inspect.signature(type(trunk).forward).parameters
    options = {"use_cache": cache is not None}
    if cache is not None:  # transformers 5.24 renamed it
        options["cache" if "cache" in known else "past_key_values"] = cache
    if "position_ids" in known:  # BLOOM and MPT count positions from the mask
        n = input_ids.shape[1]
        options["position_ids"] = position_ids(attention_mask)[:, -n:]
    text = {"input_ids": input_ids, "attention_mask": attention_mask}
    return trunk(**text, **options).last_hidden_state


def vocabulary_weight(lm: nn.Module) -> Tensor:
    """The matrix (V, d) that turns a hidden state into logits."""
    return lm.get_output_embeddings().weight


def vocabulary_logits(lm: nn.Module, hidden: Tensor) -> Tensor:
    """The language model's logits (..., V) for hidden states (..., d).

    In the precision of the weights (float32), whatever the trunk computed in: GPT-2's
    logits lie near -100, where half-precision numbers are too far apart.
    """
    weight = vocabulary_weight(lm)
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden.to(weight.dtype), weight)


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


def label_logprobs(lm, hidden, labels, temperature=1.0) -> Tensor:
    """`token_logprobs(vocabulary_logits(lm, hidden), labels, temperature)`, but faster.

    hidden (N, d), labels (N,) -> (N,), in nats. With z = W h and p = softmax(z),

    d log p_label / d h = W_label - p W,  d log p_label / d W_v = (1[v = label] - p_v) h

    so all that the backward pass needs is exp(z - max z), which the forward pass
    leaves behind in the place of z: one (N, V) tensor where automatic differentiation
    keeps three, and a sixth of an update's time for a model of GPT-2's size. Wijmans et
    al. 2024 (arXiv 2411.09009) keep none. Raises ValueError if the shapes disagree.
    """
    check_shapes(**{"hidden without d": hidden[:, 0], "labels": labels})
    weight = at_least_float32(vocabulary_weight(lm))
    with torch.autocast(hidden.device.type, enabled=False):
        hidden = hidden.to(weight.dtype) / temperature
        return _LinearLogprobs.apply(hidden, weight, labels)


class RewardHead(nn.Linear):
    """One number from a hidden state: (..., d) -> (...).

    The weights begin normal with a deviation of 1/sqrt(d + 1), and the bias at 0, as in
    `lm-human-preferences`.
    """

    def __init__(self, hidden_size: int):
        super().__init__(hidden_size, 1)
        nn.init.normal_(self.weight, std=1 / math.sqrt(hidden_size + 1))
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """The head's output in the precision of its weights."""
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.to(self.weight.dtype)).squeeze(-1)


class RewardModel(nn.Module):
    """A trunk and a reward head, read at the last real token of the text.

    The trunk is a model without its vocabulary projection, which is not needed here.
    """

    HEAD_FILE = "reward_head.safetensors"

    def __init__(self, trunk: nn.Module):
        super().__init__()
        self.trunk = trunk
        # Not the config's size: OPT-350m's states are smaller than its layers
        self.head = RewardHead(trunk.get_input_embeddings().weight.shape[1])

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Raw logits (B,) of "positive" for texts (B, L), padded on either side."""
        hidden = hidden_states(self.trunk, input_ids, attention_mask)
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = (attention_mask * places).argmax(dim=-1)
        return self.head(hidden[torch.arange(len(last), device=last.device), last])

    @classmethod
    def from_pretrained(cls, name: str) -> "RewardModel":
        """A saved reward model, or the trunk of `name` under a fresh head."""
        model = cls(read_model(AutoModel, name))
        head_file = Path(name) / cls.HEAD_FILE
        if head_file.exists():
            with loading("reward head", head_file):
                model.head.load_state_dict(load_file(head_file))
        return model

    def save_pretrained(self, folder):
        """Write trunk and head as safetensors."""
        self.trunk.save_pretrained(folder)
        save_file(self.head.state_dict(), Path(folder) / self.HEAD_FILE)


class PolicyWithValueHead(nn.Module):
    """A language model (the actor) and a value head on its states (the critic)."""

    def __init__(self, lm: nn.Module):
        super().__init__()
        self.lm = lm
        self.value_head = RewardHead(vocabulary_weight(lm).shape[1])
        nn.init.zeros_(self.value_head.weight)  # a fresh critic expects nothing
