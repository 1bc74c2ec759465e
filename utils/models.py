"""The models of the three stages: a trunk with a head for each job."""

import math
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DynamicCache,
)

from utils.fast import arguments_of, hidden_states_by_length, takes_positions
from utils.inputs import (
    check_alike,
    check_causal,
    download_weights,
    loading,
    trying,
)

FOUR_BITS = "for 4 bits: pip install bitsandbytes accelerate (CPUs will do)"


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


def _read_lm(name, **options):
    config = load_config(name)
    with loading("language model", name):
        download_weights(name)
        return AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=torch.float32, use_safetensors=True, **options
        )


def load_causal_lm(name: str, device="cpu"):
    """The language model `name` (on the hub, or a local folder) in float32.

    float32 weights also where the trunk computes in half precision: the optimiser's
    small steps would be lost in the rounding of half-precision weights. Raises
    ValueError if the model is not causal, or not what `check_reading` and
    `check_writing` ask for.
    """
    lm = _read_lm(name)
    with trying(name):
        check_causal(lm, name)
        check_reading(lm.base_model, name)
        check_writing(lm, name)
    return let_go_of_its_file(lm).to(device)


def load_in_4_bits(name: str):
    """The language model `name` on the CPU, frozen, its linear layers in NF4.

    Doubly quantised, by the library bitsandbytes; the rest is in float32, and so is
    what is computed. Raises ImportError if it is not installed, and ValueError for a
    layer whose inputs are no whole blocks of 64 (bitsandbytes 0.50 unpacks their
    weights wrongly on a CPU).
    """
    if find_spec("bitsandbytes") is None or find_spec("accelerate") is None:
        raise ImportError(FOUR_BITS)
    rounding = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    lm = _read_lm(name, quantization_config=rounding, device_map="cpu")
    for path, layer in lm.named_modules():
        if type(layer).__name__ == "Linear4bit":
            if layer.in_features % 64:
                raise ValueError(
                    f"{path} of {name!r} has {layer.in_features} inputs, which are no "
                    "whole blocks of 64; take another model, or float32"
                )
            # Else the first pass without gradients, such as a rollout, packs its weight
            # for a product of other precision, which has no backward pass
            layer.support_avx512bf16_for_cpu = False
    return freeze(lm)


@torch.no_grad()
def let_go_of_its_file(model: nn.Module) -> nn.Module:
    """The model, with weights that lie in memory and no longer in its file.

    What was read stays mapped to the file otherwise, and Windows lets nobody replace
    a file that is: neither this notebook nor another one could save its model anew.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


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
    positions = {}
    if takes_positions(trunk):
        positions["position_ids"] = position_ids(attention_mask)
    return trunk(
        input_ids=input_ids,
        attention_mask=attention_mask,
        use_cache=False,
        **positions,
    ).last_hidden_state


@torch.no_grad()
def states_size(trunk: nn.Module) -> int:
    """d, the size of the trunk's hidden states, of which OPT-350m has two sizes."""
    training, ids = trunk.training, torch.zeros(1, 1, dtype=torch.long)
    ids = ids.to(trunk.device)
    states = hidden_states(trunk.eval(), ids, torch.ones_like(ids))
    trunk.train(training)
    return states.shape[-1]


def next_hidden_states(
    trunk: nn.Module, input_ids: Tensor, attention_mask: Tensor, start: int, cache
) -> Tensor:
    """`hidden_states` from place `start` on; the cache remembers what came before."""
    positions = {}
    if takes_positions(trunk):
        positions["position_ids"] = position_ids(attention_mask)[:, start:]
    return trunk(
        input_ids=input_ids[:, start:],
        attention_mask=attention_mask,
        use_cache=True,
        **{cache_argument(trunk): cache},
        **positions,
    ).last_hidden_state


def cache_argument(model: nn.Module) -> str:
    """What a model calls its cache of keys and values: transformers 5.24 renamed it."""
    known = arguments_of(type(model).forward)
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


# Tokens that every vocabulary has, and another one to pad with
TEXT, PADDING = (0, 1, 2, 1, 0), 3


@torch.no_grad()
def check_reading(trunk: nn.Module, name):
    """Raise ValueError if padding on the left changes what a trunk reads.

    Tried twice: with token ids, as a reward model reads, and with embeddings that were
    looked up beforehand, as PPO reads (`hidden_states_by_length`).
    """
    ids = torch.tensor([TEXT], device=trunk.device)
    alone = hidden_states(trunk, ids, torch.ones_like(ids))
    ids, mask = F.pad(ids, (3, 0), value=PADDING), F.pad(torch.ones_like(ids), (3, 0))
    positions, ends = position_ids(mask), torch.tensor([ids.shape[1]])
    for found in (
        hidden_states(trunk, ids, mask),
        hidden_states_by_length(trunk, ids, mask, positions, ends),
    ):
        check_alike(
            found[:, 3:], alone, name, "padding on the left changes what it reads"
        )


@torch.no_grad()
def check_writing(lm: nn.Module, name):
    """Raise ValueError if a model writes otherwise than this series takes for granted.

    Its logits must be `vocabulary_logits` of its states, also where they are large: a
    cap leaves small ones unchanged. And it must read the same with a cache, also after
    a row was dropped from that, as `sample_responses` does.
    """
    head, weight = lm.get_output_embeddings(), vocabulary_weight(lm)
    ids = torch.tensor([TEXT, TEXT[::-1]], device=lm.device)
    mask = torch.ones_like(ids)
    states = hidden_states(lm.base_model, ids, mask)
    random = torch.Generator().manual_seed(0)
    large = torch.randn(states.shape, generator=random).to(weight)
    large *= 10 / weight.norm(dim=1).mean()  # so that the logits are about 10
    theirs = lm(input_ids=ids, attention_mask=mask).logits
    hook = head.register_forward_pre_hook(lambda *_: (large,))
    capped = lm(input_ids=ids, attention_mask=mask).logits
    hook.remove()
    for given, logits in ((states, theirs), (large, capped)):
        ours = vocabulary_logits(lm, given).log_softmax(dim=-1)
        fault = "it scales, caps or changes its logits"
        check_alike(ours, logits.log_softmax(dim=-1), name, fault)
    cache = DynamicCache(config=lm.config)
    next_hidden_states(lm.base_model, ids[:, :3], mask[:, :3], 0, cache)
    cache.batch_select_indices(torch.tensor([1], device=lm.device))
    found = next_hidden_states(lm.base_model, ids[1:], mask[1:], 3, cache)
    check_alike(found, states[1:, 3:], name, "it reads otherwise with a cache")


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
        self.head = RewardHead(states_size(trunk))

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
        with trying(name):
            check_reading(trunk, name)
        model = cls(trunk)
        head_file = Path(name) / cls.HEAD_FILE
        if head_file.exists():
            model.head.load_state_dict(load_file(head_file))
        return let_go_of_its_file(model)

    def save_pretrained(self, folder, state_dict=None):
        """Write trunk and head as safetensors; their weights, or these."""
        trunk, head = {}, self.head.state_dict()
        if state_dict:
            named = [(*name.split(".", 1), x) for name, x in state_dict.items()]
            trunk["state_dict"] = {n: x for part, n, x in named if part == "trunk"}
            head = {n: x for part, n, x in named if part == "head"}
        self.trunk.save_pretrained(folder, **trunk)
        save_file(head, Path(folder) / self.HEAD_FILE)


class PolicyWithValueHead(nn.Module):
    """A language model (the actor) and a value head on its states (the critic)."""

    def __init__(self, lm: nn.Module):
        super().__init__()
        self.lm = lm
        self.value_head = ValueHead(vocabulary_weight(lm).shape[1])
