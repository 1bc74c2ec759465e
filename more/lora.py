"""Low-rank adapters by hand: LoRA (Hu et al. 2021, arXiv 2106.09685).

A frozen layer W x gets a small trainable neighbour of rank r beside it:

    W x + s B A x        A (r, in), B (out, r), s = alpha / r

B starts at 0, so a fresh adapter changes nothing at all. A model may hold several
adapters by name, of which one or none is on. The files are those of PEFT. Who names an
adapter that the model has not gets a ValueError.
"""

import copy
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils import CONFIG_NAME as CONFIG
from peft.utils import SAFETENSORS_WEIGHTS_NAME as WEIGHTS
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D  # GPT-2's layer; its weight is (in, out)

from utils.data import loading

PREFIX = "base_model.model."  # of every key in PEFT's file
# Of PEFT's configuration: what is read, says no more than the tensors do, or matters
# in training only. All else must be as in its plain LoRA
READ = {"r", "lora_alpha", "use_rslora", "lora_dropout", "task_type", "revision"}
READ |= {"base_model_name_or_path", "target_modules", "exclude_modules", "peft_version"}
READ |= {"layers_to_transform", "layers_pattern", "fan_in_fan_out", "inference_mode"}
READ |= {"auto_mapping"}


class Adapter(nn.Module):
    """One low-rank neighbour: x (..., in) -> s B A x (..., out)."""

    def __init__(self, size_in: int, size_out: int, rank: int, scale: float, like):
        super().__init__()
        options = {"device": like.device, "dtype": torch.float32}
        self.lora_A = nn.Linear(size_in, rank, bias=False, **options)
        self.lora_B = nn.Linear(rank, size_out, bias=False, **options)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.rank, self.scale = rank, scale

    def forward(self, x: Tensor) -> Tensor:
        """s B A x, in the adapter's own precision unless autocast has another."""
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.lora_A.weight.dtype)
        # The scale where it is cheap: r numbers instead of out
        return self.lora_B(self.scale * self.lora_A(x))


class AdaptedLayer(nn.Module):
    """A frozen layer with adapters beside it, of which at most one is on."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base, self.adapters, self.on = base, nn.ModuleDict(), None

    def forward(self, x: Tensor) -> Tensor:
        """W x, and s B A x of the adapter that is on."""
        out = self.base(x)
        if self.on is None:
            return out
        return out + self.adapters[self.on](x).to(out.dtype)


def adapted_layer(layer: nn.Module, A: Tensor, B: Tensor, alpha: float) -> nn.Module:
    """A layer W x that gives W x + (alpha / r) B A x, for A (r, in) and B (out, r).

    `layer` is an `nn.Linear` or GPT-2's `Conv1D`, and stays as it is. What
    `add_adapter` does to each layer, with matrices of one's own.
    """
    (rank, size_in), size_out = A.shape, B.shape[0]
    adapter = Adapter(size_in, size_out, rank, alpha / rank, layer.weight)
    adapter.lora_A.weight, adapter.lora_B.weight = nn.Parameter(A), nn.Parameter(B)
    adapted = AdaptedLayer(layer)
    adapted.adapters["own"], adapted.on = adapter, "own"
    return adapted


def merged_weight(layer: nn.Module, A: Tensor, B: Tensor, alpha: float) -> Tensor:
    """W + (alpha / r) B A as the layer stores it: (out, in), or `Conv1D`'s (in, out).

    Added up in float32 at least, and rounded to the weight's type.
    """
    weight = layer.weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    with torch.autocast(weight.device.type, enabled=False):
        update = alpha / len(A) * (B.to(dtype) @ A.to(dtype))
    if isinstance(layer, Conv1D):
        update = update.t()
    return (weight.to(dtype) + update).to(weight.dtype)


def sizes(layer: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear layer, be it `nn.Linear` or GPT-2's `Conv1D`."""
    size_in, size_out = layer.weight.shape
    return (size_in, size_out) if isinstance(layer, Conv1D) else (size_out, size_in)


def linear_layers(lm: nn.Module) -> dict[str, nn.Module]:
    """A language model's linear layers but for the projection to the vocabulary."""
    return {
        name.removesuffix(".base"): layer
        for name, layer in lm.named_modules()
        if isinstance(layer, nn.Linear | Conv1D)
        and layer is not lm.get_output_embeddings()
        and ".adapters." not in name
    }


def _adapted(model) -> dict[str, AdaptedLayer]:
    return {n: m for n, m in model.named_modules() if isinstance(m, AdaptedLayer)}


def add_adapter(
    model: nn.Module, name: str, rank: int = 8, alpha: float = 16, targets=None
) -> nn.Module:
    """Freeze the model, and put a fresh adapter beside its linear layers; it is on.

    `targets` are ends of layers' names, such as "c_attn"; without them it is every
    linear layer but the projection to the vocabulary. A is drawn as PyTorch draws a
    linear layer, B is 0 (arXiv 2106.09685, section 4.1). Only adapters can be trained
    afterwards; those that were there stay as they are, frozen or not. Returns the
    model. Raises ValueError for a rank below 1, a name that is taken or has a dot, or a
    target that no layer's name ends in.
    """
    if rank < 1:
        raise ValueError(f"the rank of an adapter must be 1 or more, got {rank}")
    if not name or "." in name or name in adapter_names(model):
        taken = adapter_names(model)
        raise ValueError(f"{name!r} is empty, dotted or one of {taken}; change it")
    layers = linear_layers(model)
    targets = layers if targets is None else targets
    ends = {t: [x for x in layers if f".{x}".endswith(f".{t}")] for t in targets}
    if unknown := [target for target, found in ends.items() if not found]:
        known = sorted({layer.rpartition(".")[2] for layer in layers})
        raise ValueError(
            f"no layer is called {unknown[0]!r}; take targets from {', '.join(known)}"
        )
    for key, weight in model.named_parameters():
        if ".adapters." not in key:
            weight.requires_grad_(False)
    for path in {path: None for found in ends.values() for path in found}:
        place, base = model.get_submodule(path), layers[path]
        if not isinstance(place, AdaptedLayer):
            place = AdaptedLayer(place)
            model.set_submodule(path, place)
        adapter = Adapter(*sizes(base), rank, alpha / rank, base.weight)
        place.adapters[name] = adapter.train(model.training)
    switch(model, name)
    return model


def adapter_names(model: nn.Module) -> list[str]:
    """The adapters that a model holds."""
    return sorted({name for one in _adapted(model).values() for name in one.adapters})


def _layers_with(model, name) -> dict[str, AdaptedLayer]:
    """The layers that have this adapter; ValueError if there are none."""
    if name not in (known := adapter_names(model)):
        raise ValueError(
            f"the model has no adapter {name!r}; it has {', '.join(known) or 'none'}"
        )
    return {k: layer for k, layer in _adapted(model).items() if name in layer.adapters}


def switch(model: nn.Module, name: str | None):
    """Turn this adapter on and all others off; None: all off."""
    chosen = {} if name is None else _layers_with(model, name)
    for path, layer in _adapted(model).items():
        layer.on = name if path in chosen else None


@contextmanager
def using(model: nn.Module, name: str | None) -> Iterator[nn.Module]:
    """Within it this adapter is on, or none; after it, however it ends, what was."""
    before = {layer: layer.on for layer in _adapted(model).values()}
    switch(model, name)
    try:
        yield model
    finally:
        for layer, on in before.items():
            layer.on = on


def sharing(model: nn.Module, name: str | None) -> nn.Module:
    """Another model on the very same weights: `model` under this adapter, or none.

    Its modules are its own and its tensors are not, so it takes no memory and always
    shows what `model` has learnt. It holds this adapter alone, which is on; for None,
    it is the plain base. So code that asks for two models can be given one twice.
    Raises ValueError if the model has no adapter of this name.
    """
    if name is not None:
        _layers_with(model, name)
    tensors = (*model.parameters(), *model.buffers())
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    for path, layer in _adapted(twin).items():
        if name in layer.adapters:
            layer.adapters = nn.ModuleDict({name: layer.adapters[name]})
            layer.on = name
        else:
            twin.set_submodule(path, layer.base)
    return twin


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """What these tensors take, each piece of memory counted once."""
    pieces = [x.untyped_storage() for x in tensors]
    return sum({piece.data_ptr(): piece.nbytes() for piece in pieces}.values())


@torch.no_grad()
def merge_adapter(model: nn.Module, name: str) -> nn.Module:
    """Put an adapter into the weights, W + s B A, and take it away; returns the model.

    Without any adapter left, the layers are plain ones again, and all weights can be
    trained.
    """
    layers = _layers_with(model, name)
    for path, layer in layers.items():
        adapter = layer.adapters.pop(name)
        matrices, alpha = adapter.parameters(), adapter.scale * adapter.rank
        layer.base.weight.copy_(merged_weight(layer.base, *matrices, alpha))
        layer.on = None if layer.on == name else layer.on
        if not layer.adapters:
            model.set_submodule(path, layer.base)
    if not _adapted(model):
        model.requires_grad_(True)
    return model


def save_adapter(model: nn.Module, name: str, folder):
    """Write an adapter as PEFT does: `PeftModel.from_pretrained` reads the folder."""
    layers = _layers_with(model, name)
    one = next(iter(layers.values()))
    LoraConfig(
        r=one.adapters[name].rank,
        lora_alpha=one.adapters[name].scale * one.adapters[name].rank,
        target_modules=list(layers),
        fan_in_fan_out=isinstance(one.base, Conv1D),
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.config._name_or_path,
    ).save_pretrained(folder)
    tensors = {
        f"{PREFIX}{path}.{part}": weight.detach().cpu().contiguous()
        for path, layer in layers.items()
        for part, weight in layer.adapters[name].named_parameters()
    }
    save_file(tensors, Path(folder) / WEIGHTS, metadata={"format": "pt"})


def load_adapter(model: nn.Module, name: str, folder) -> nn.Module:
    """Add an adapter from files of PEFT; it is on. Returns the model.

    Raises OSError if they cannot be read, and ValueError if the adapter is not PEFT's
    plain LoRA, or if its matrices are not those of its rank and this model.
    """
    with loading("adapter", folder):
        config = json.loads((Path(folder) / CONFIG).read_text("utf8"))
        tensors = load_file(Path(folder) / WEIGHTS)
    plain = LoraConfig().to_dict()
    own = {k: x for k, x in config.items() if x and k not in READ}
    if unread := {k: x for k, x in own.items() if x != plain.get(k)}:
        raise ValueError(
            f"{folder} has parts that are not read here, {unread}; merge it with PEFT"
        )
    rank, alpha = config["r"], config["lora_alpha"]
    if config.get("use_rslora"):  # s = alpha / sqrt(r): arXiv 2312.03732
        alpha *= math.sqrt(rank)
    targets = {key.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for key in tensors}
    there, wanted = {key: tuple(x.shape) for key, x in tensors.items()}, {}
    layers = linear_layers(model)
    for path in targets & layers.keys():
        size_in, size_out = sizes(layers[path])
        wanted[f"{PREFIX}{path}.lora_A.weight"] = rank, size_in
        wanted[f"{PREFIX}{path}.lora_B.weight"] = size_out, rank
    for key in sorted({*there, *wanted}):
        found, right = there.get(key, "none"), wanted.get(key, "no layer")
        if found != right:
            raise ValueError(
                f"{folder} has {key} of {found}, where its rank and this model give "
                f"{right}; take the base model and the configuration of its training"
            )
    add_adapter(model, name, rank, alpha, sorted(targets))
    ours = f".adapters.{name}.lora_"
    model.load_state_dict(
        {k.removeprefix(PREFIX).replace(".lora_", ours): x for k, x in tensors.items()},
        strict=False,
    )
    return model
