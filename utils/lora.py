"""Low-rank adapters by hand: LoRA (Hu et al. 2021, arXiv 2106.09685).

A frozen layer W x gets a small trainable neighbour of rank r beside it:

    W x + s B A x        A (r, in), B (out, r), s = alpha / r

B starts at 0, so a fresh adapter changes nothing at all. A model may hold several
adapters by name, of which one or none is on. The files are those of PEFT.
"""

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every key in PEFT's file


class Adapter(nn.Module):
    """One low-rank neighbour: x (..., in) -> s B A x (..., out)."""

    def __init__(self, size_in: int, size_out: int, rank: int, scale: float, like):
        super().__init__()
        options = {"device": like.device, "dtype": torch.float32}
        self.lora_A = nn.Linear(size_in, rank, bias=False, **options)
        self.lora_B = nn.Linear(rank, size_out, bias=False, **options)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """s B A x, in the adapter's own precision unless autocast has another."""
        return self.scale * self.lora_B(self.lora_A(x.to(self.lora_A.weight.dtype)))


class AdaptedLayer(nn.Module):
    """A frozen linear layer with adapters beside it, of which at most one is on."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base, self.adapters, self.on = base, nn.ModuleDict(), None

    def forward(self, x: Tensor) -> Tensor:
        """W x, and s B A x of the adapter that is on."""
        out = self.base(x)
        if self.on is None:
            return out
        return out + self.adapters[self.on](x).to(out.dtype)


def _stores_transposed(layer) -> bool:
    """GPT-2's `Conv1D` has its weight as (in, out), `nn.Linear` as (out, in)."""
    return type(layer).__name__ == "Conv1D"


def _sizes(layer) -> tuple[int, int]:
    size_out, size_in = layer.weight.shape
    return (size_out, size_in) if _stores_transposed(layer) else (size_in, size_out)


def _adapted(model) -> dict[str, AdaptedLayer]:
    return {n: m for n, m in model.named_modules() if isinstance(m, AdaptedLayer)}


def _plain_layers(model) -> dict[str, nn.Module]:
    """The linear layers by name, but for those that project to the vocabulary."""
    embedding = model.get_input_embeddings().weight.shape[0]
    return {
        name: layer
        for name, layer in model.named_modules()
        if (isinstance(layer, nn.Linear) or _stores_transposed(layer))
        and _sizes(layer)[1] != embedding
        and ".adapters." not in name
    }


def _ends_in(name: str, targets) -> bool:
    return any(name == t or name.endswith(f".{t}") for t in targets)


def add_adapter(
    model: nn.Module,
    name: str,
    rank: int = 8,
    alpha: float = 16,
    targets: Iterable[str] | None = None,
    rank_stabilised: bool = False,
) -> nn.Module:
    """Freeze the model, and put a fresh adapter beside its linear layers; it is on.

    `targets` are ends of layers' names, such as "c_attn"; without them it is every
    linear layer but the projection to the vocabulary. s = alpha / r, or alpha / sqrt(r)
    if `rank_stabilised` (Kalajdzievski 2023, arXiv 2312.03732). A is drawn as PyTorch
    draws a linear layer, B is 0 (arXiv 2106.09685, section 4.1). Only adapters can be
    trained afterwards; adapters that were there stay as they are. Returns the model.
    Raises ValueError for a rank below 1, a name that is taken or has a dot, or a target
    that no layer's name ends in.
    """
    if rank < 1:
        raise ValueError(f"the rank of an adapter must be 1 or more, got {rank}")
    if not name or "." in name or name in adapter_names(model):
        raise ValueError(
            f"an adapter cannot be called {name!r}; take a name without dots that is "
            f"none of {adapter_names(model)}"
        )
    layers = {k.removesuffix(".base"): v for k, v in _plain_layers(model).items()}
    ends = sorted({layer.rpartition(".")[2] for layer in layers})
    for target in ends if targets is None else (targets := list(targets)):
        if not any(_ends_in(layer, [target]) for layer in layers):
            raise ValueError(
                f"no layer is called {target!r}; take targets from {', '.join(ends)}"
            )
    chosen = [k for k in layers if targets is None or _ends_in(k, targets)]
    model.requires_grad_(False)
    scale = alpha / (math.sqrt(rank) if rank_stabilised else rank)
    for layer in chosen:
        place = model.get_submodule(layer)
        if not isinstance(place, AdaptedLayer):
            place = AdaptedLayer(place)
            model.set_submodule(layer, place)
        adapter = Adapter(*_sizes(place.base), rank, scale, place.base.weight)
        place.adapters[name] = adapter.train(model.training)
    for layer in _adapted(model).values():
        layer.adapters.requires_grad_(True)
    switch(model, name)
    return model


def adapter_names(model: nn.Module) -> list[str]:
    """The adapters that a model holds."""
    return sorted(
        {name for layer in _adapted(model).values() for name in layer.adapters}
    )


def _check_known(model, name):
    if name not in (known := adapter_names(model)):
        raise ValueError(
            f"the model has no adapter {name!r}; it has {', '.join(known) or 'none'}"
        )


def switch(model: nn.Module, name: str | None):
    """Turn this adapter on and all others off; None: all off.

    Raises ValueError if the model has no adapter of this name.
    """
    if name is not None:
        _check_known(model, name)
    for layer in _adapted(model).values():
        layer.on = name if name in layer.adapters else None


@contextmanager
def using(model: nn.Module, name: str | None) -> Iterator[nn.Module]:
    """Within it this adapter is on, or none; afterwards what was on before.

    Also after an exception. Raises ValueError if there is no adapter of this name.
    """
    before = {layer: layer.on for layer in _adapted(model).values()}
    switch(model, name)
    try:
        yield model
    finally:
        for layer, on in before.items():
            layer.on = on


def _update(layer: AdaptedLayer, name: str) -> Tensor:
    """s B A in float32, in the shape of the layer's weight."""
    adapter = layer.adapters[name]
    with torch.autocast(adapter.lora_A.weight.device.type, enabled=False):
        update = adapter.lora_B.weight.float() @ adapter.lora_A.weight.float()
    update = adapter.scale * update
    return update.t() if _stores_transposed(layer.base) else update


@torch.no_grad()
def merge_adapter(model: nn.Module, name: str) -> nn.Module:
    """Put an adapter into the weights, W + s B A, and take it away; returns the model.

    Added up in float32. Without any adapter left, the layers are plain ones again, and
    all weights can be trained. Raises ValueError if there is no adapter of this name.
    """
    _check_known(model, name)
    for path, layer in _adapted(model).items():
        if name in layer.adapters:
            weight = layer.base.weight
            weight.copy_((weight.float() + _update(layer, name)).to(weight.dtype))
            del layer.adapters[name]
            layer.on = None if layer.on == name else layer.on
        if not layer.adapters:
            model.set_submodule(path, layer.base)
    if not _adapted(model):
        model.requires_grad_(True)
    return model


def save_adapter(model: nn.Module, name: str, folder):
    """Write an adapter as PEFT does: `PeftModel.from_pretrained` reads the folder.

    Raises ValueError if there is no adapter of this name.
    """
    _check_known(model, name)
    tensors, scales, ranks, transposed = {}, set(), set(), set()
    layers = {k: v for k, v in _adapted(model).items() if name in v.adapters}
    for path, layer in layers.items():
        adapter = layer.adapters[name]
        for part in ("lora_A", "lora_B"):
            weight = getattr(adapter, part).weight.detach().cpu().contiguous()
            tensors[f"{PREFIX}{path}.{part}.weight"] = weight
        ranks.add(adapter.lora_A.out_features)
        scales.add(adapter.scale)
        transposed.add(_stores_transposed(layer.base))
    (rank,), (scale,) = ranks, scales
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.config._name_or_path,
        "r": rank,
        "lora_alpha": scale * rank,
        "target_modules": sorted(layers),
        "fan_in_fan_out": transposed == {True},
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "inference_mode": True,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf8")


def load_adapter(model: nn.Module, name: str, folder) -> nn.Module:
    """Add an adapter from files of PEFT; it is on. Returns the model.

    Raises FileNotFoundError if they are not there, and ValueError if the adapter is
    not a plain LoRA, or belongs to layers or sizes that this model does not have.
    """
    folder = Path(folder)
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).exists():
            raise FileNotFoundError(f"{folder} has no {file}; save an adapter there")
    config = json.loads((folder / CONFIG).read_text("utf8"))
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"{folder} holds a {config.get('peft_type')}, and only LORA can be read"
        )
    unread = [n for n in ("use_dora", "rank_pattern", "alpha_pattern") if config.get(n)]
    if unread or config.get("bias", "none") != "none":
        raise ValueError(
            f"{folder} needs {', '.join(unread) or 'trained biases'}, which is not "
            "read here; merge it with PEFT"
        )
    tensors = load_file(folder / WEIGHTS)
    targets = sorted({k.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for k in tensors})
    layers = {k.removesuffix(".base"): v for k, v in _plain_layers(model).items()}
    rank = config["r"]
    for target in targets:
        if target not in layers:
            raise ValueError(
                f"the adapter in {folder} belongs to a layer {target!r}, which this "
                "model does not have; load it into its own base model"
            )
        size_in, size_out = _sizes(layers[target])
        wanted = {"lora_A": (rank, size_in), "lora_B": (size_out, rank)}
        for part, shape in wanted.items():
            found = tuple(tensors[f"{PREFIX}{target}.{part}.weight"].shape)
            if found != shape:
                raise ValueError(
                    f"{part} of {target} in {folder} has the shape {found}, and rank "
                    f"{rank} on this model takes {shape}; load it into its own base"
                )
    stabilised = bool(config.get("use_rslora"))
    add_adapter(model, name, rank, config["lora_alpha"], targets, stabilised)
    adapted = _adapted(model)
    with torch.no_grad():
        for target in targets:
            adapter = adapted[target].adapters[name]
            for part in ("lora_A", "lora_B"):
                weight = tensors[f"{PREFIX}{target}.{part}.weight"]
                getattr(adapter, part).weight.copy_(weight)
    return model
