"""The models of the three stages: a trunk with a head for each job."""

import inspect
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from utils.inputs import check_causal, download_weights, loading


def load_config(name: str):
    """The configuration of a model, with GPT-2's activation function as one operation.

    `gelu_new` is computed in eight steps, each of which keeps its result for the
    backward pass; `gelu_pytorch_tanh` is the same function in one.
    """
    with loading("model", name):
        config = AutoConfig.from_pretrained(name)
    if getattr(config, "activation_function", None) == "gelu_new":
        config.activation_function = "gelu_pytorch_tanh"
    return config


def load_causal_lm(name: str, device="cpu"):
    """The language model `name` (on the hub, or a local folder) in float32.

    float32 weights also where the trunk computes in half precision: the optimiser's
    small steps would be lost in the rounding of half-precision weights. Raises
    ValueError if the model is not causal.
    """
    config = load_config(name)
    with loading("language model", name):
        download_weights(name)
        lm = AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=torch.float32, use_safetensors=True
        )
    check_causal(lm, name)
    return lm.to(device)


def freeze(model: nn.Module) -> nn.Module:
    """The model without dropout and without gradients."""
    return model.eval().requires_grad_(False)


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions that count real tokens only: (B, L) -> (B, L).

    GPT-2's position embeddings are absolute, so without this a left-padded sentence
    would be read as if it began in the middle of a text.
    """
    return (attention_mask.cumsum(dim=-1) - 1).clamp(min=0)


def hidden_states(
    trunk: nn.Module, input_ids: Tensor, attention_mask: Tensor
) -> Tensor:
    """The trunk's last hidden states (B, L, d) for ids and mask (B, L)."""
    return trunk(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids(attention_mask),
        use_cache=False,
    ).last_hidden_state


def cache_argument(model: nn.Module) -> str:
    """What a model calls its cache of keys and values: transformers 5.24 renamed it."""
    known = inspect.signature(model.forward).parameters
    return "cache" if "cache" in known else "past_key_values"


def vocabulary_weight(lm: nn.Module) -> Tensor:
    """The matrix (V, d) that turns a hidden state into logits.

    Raises ValueError if the model adds a bias, which GPT-2's and Llama's kind do not.
    """
    head = lm.get_output_embeddings()
    if head.bias is not None:
        raise ValueError(
            f"the vocabulary projection of {type(lm).__name__} has a bias; "
            "take a model without one, such as gpt2"
        )
    return head.weight


def vocabulary_logits(lm: nn.Module, hidden: Tensor) -> Tensor:
    """The language model's logits (..., V) for hidden states (..., d).

    In the precision of the weights (float32), whatever the trunk computed in.
    """
    weight = vocabulary_weight(lm)
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden.to(weight.dtype), weight)


class RewardHead(nn.Linear):
    """One number from a hidden state: weights N(0, 1/sqrt(d + 1)), bias 0.

    (..., d) -> (...). The initialisation is `lm-human-preferences`'.
    """

    def __init__(self, hidden_size: int):
        super().__init__(hidden_size, 1)
        nn.init.normal_(self.weight, std=1 / math.sqrt(hidden_size + 1))
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """The head's output in the precision of its weights."""
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.to(self.weight.dtype)).squeeze(-1)


class ValueHead(RewardHead):
    """The same with zeros, so that a fresh critic expects nothing."""

    def __init__(self, hidden_size: int):
        super().__init__(hidden_size)
        nn.init.zeros_(self.weight)


class RewardModel(nn.Module):
    """A trunk and a reward head, read at the last real token of the text.

    The trunk has no vocabulary projection: nothing is computed that is not used.
    """

    HEAD_FILE = "reward_head.safetensors"

    def __init__(self, trunk: nn.Module):
        super().__init__()
        self.trunk = trunk
        self.head = RewardHead(trunk.config.hidden_size)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Raw logits (B,) of "positive" for texts (B, L), padded on either side."""
        hidden = hidden_states(self.trunk, input_ids, attention_mask)
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = (attention_mask * places).argmax(dim=-1)
        return self.head(hidden[torch.arange(len(last), device=last.device), last])

    @classmethod
    def from_pretrained(cls, name: str) -> "RewardModel":
        """A saved reward model, or the trunk of `name` under a fresh head."""
        config = load_config(name)
        with loading("model", name):
            download_weights(name)
            trunk = AutoModel.from_pretrained(
                name, config=config, dtype=torch.float32, use_safetensors=True
            )
        model = cls(trunk)
        head_file = Path(name) / cls.HEAD_FILE
        if head_file.exists():
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
        self.value_head = ValueHead(lm.config.hidden_size)
