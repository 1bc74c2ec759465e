"""Low-rank adapters by hand: LoRA (Hu et al. 2021, arXiv 2106.09685).

A frozen layer W x gets a small trainable neighbour of rank r beside it:

    W x + s B A x        A (r, in), B (out, r), s = alpha / r

B starts at 0, so a fresh adapter changes nothing at all. An embedding, whose x says
which word it is, may have one, too; there A starts at 0. A model may hold several
adapters by name, of which one or none is on. The files are those of PEFT.
"""

import copy
import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from utils.ppo import token_logprobs

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
        self.rank, self.scale = rank, scale

    def forward(self, x: Tensor) -> Tensor:
        """s B A x, in the adapter's own precision unless autocast has another."""
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.lora_A.weight.dtype)
        # The scale where it is cheap: r numbers instead of out
        return self.lora_B(self.scale * self.lora_A(x))


class EmbeddingAdapter(nn.Module):
    """The same beside an embedding: ids (...) -> s B A_id (..., out)."""

    def __init__(self, words: int, size_out: int, rank: int, scale: float, like):
        super().__init__()
        options = {"device": like.device, "dtype": torch.float32}
        self.lora_embedding_A = nn.Parameter(torch.zeros(rank, words, **options))
        self.lora_embedding_B = nn.Parameter(torch.randn(size_out, rank, **options))
        self.rank, self.scale = rank, scale

    def forward(self, ids: Tensor) -> Tensor:
        """s B times the column of A that belongs to each word."""
        columns = F.embedding(ids, self.lora_embedding_A.t())
        return self.scale * (columns @ self.lora_embedding_B.t())


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


def _stores_transposed(layer) -> bool:
    """`Conv1D` and embeddings have their weight as (in, out), `nn.Linear` (out, in)."""
    return type(layer).__name__ == "Conv1D" or isinstance(layer, nn.Embedding)


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
    if _stores_transposed(layer):
        update = update.t()
    return (weight.to(dtype) + update).to(weight.dtype)


def _sizes(layer) -> tuple[int, int]:
    if isinstance(layer, nn.Linear):  # also one in 4 bits, of another shape
        return layer.in_features, layer.out_features
    return tuple(layer.weight.shape)


def _adapted(model) -> dict[str, AdaptedLayer]:
    return {n: m for n, m in model.named_modules() if isinstance(m, AdaptedLayer)}


def _plain_layers(model) -> dict[str, nn.Module]:
    """Linear layers and embeddings, but for what projects to the vocabulary."""
    embedding = model.get_input_embeddings()
    embedding = getattr(embedding, "base", embedding).weight.shape[0]
    return {
        name.removesuffix(".base"): layer
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

    `targets` are ends of layers' names, such as "c_attn", and may name an embedding;
    without them it is every linear layer but the projection to the vocabulary.
    s = alpha / r, or alpha / sqrt(r) if `rank_stabilised` (Kalajdzievski 2023, arXiv
    2312.03732). A is drawn as PyTorch draws a linear layer, B is 0 (arXiv 2106.09685,
    section 4.1). Only adapters can be trained afterwards; those that were there stay as
    they are, frozen or not. Returns the model.
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
    layers = _plain_layers(model)
    ends = sorted({layer.rpartition(".")[2] for layer in layers})
    if targets is None:
        targets = [k for k, v in layers.items() if not isinstance(v, nn.Embedding)]
    for target in (targets := list(targets)):
        if not any(_ends_in(layer, [target]) for layer in layers):
            raise ValueError(
                f"no layer is called {target!r}; take targets from {', '.join(ends)}"
            )
    chosen = [k for k in layers if _ends_in(k, targets)]
    for key, weight in model.named_parameters():
        if ".adapters." not in key:
            weight.requires_grad_(False)
    scale = alpha / (math.sqrt(rank) if rank_stabilised else rank)
    for layer in chosen:
        place = model.get_submodule(layer)
        if not isinstance(place, AdaptedLayer):
            place = AdaptedLayer(place)
            model.set_submodule(layer, place)
        kind = EmbeddingAdapter if isinstance(place.base, nn.Embedding) else Adapter
        adapter = kind(*_sizes(place.base), rank, scale, place.base.weight)
        place.adapters[name] = adapter.train(model.training)
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


def sharing(model: nn.Module, name: str | None) -> nn.Module:
    """Another model on the very same weights: `model` under this adapter, or none.

    Its modules are its own and its tensors are not, so it takes no memory and always
    shows what `model` has learnt. It holds this adapter alone, which is on; for None,
    it is the plain base. So code that asks for two models can be given one twice.
    Raises ValueError if the model has no adapter of this name.
    """
    if name is not None:
        _check_known(model, name)
    tensors = (*model.parameters(), *model.buffers())
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    for path, layer in _adapted(twin).items():
        if name in layer.adapters:
            layer.adapters = nn.ModuleDict({name: layer.adapters[name]})
            layer.on = name
        else:
            twin.set_submodule(path, layer.base)
    return twin


def read_one_base(
    states: Callable,
    labels: Tensor,
    vocabulary: Tensor,
    value_head: Callable,
    reward_head: Callable,
) -> dict[str, Tensor]:
    """What PPO reads of texts from one base, each number under its own adapter.

    `states(name)` (B, T, d) are the hidden states that predict `labels` (B, T), under
    the adapter `name`, or with all of them off for None; `vocabulary` (V, d). Returns
    logprobs and values, under the adapter "policy"; ref_logprobs, with all off; and
    scores (B,), read at the last state, under the adapter "reward".
    """
    policy, base, reward = states("policy"), states(None), states("reward")
    return {
        "logprobs": token_logprobs(policy @ vocabulary.t(), labels),
        "values": value_head(policy),
        "ref_logprobs": token_logprobs(base @ vocabulary.t(), labels),
        "scores": reward_head(reward[:, -1]),
    }


@torch.no_grad()
def merge_adapter(model: nn.Module, name: str) -> nn.Module:
    """Put an adapter into the weights, W + s B A, and take it away; returns the model.

    Added up in float32. Without any adapter left, the layers are plain ones again, and
    all weights can be trained. Raises ValueError if there is no adapter of this name,
    if a layer holds its weights in 4 bits, or if the adapter stands beside an embedding
    whose weight is the projection to the vocabulary, too, which would change with it.
    """
    _check_known(model, name)
    head = model.get_output_embeddings()
    for path, layer in _adapted(model).items():
        tied = head is not None and layer.base.weight is head.weight
        if tied and name in layer.adapters:
            raise ValueError(
                f"{path} has one weight with the projection to the vocabulary, which "
                f"merging {name!r} would change; leave it on, or give it other targets"
            )
        if name in layer.adapters and not layer.base.weight.is_floating_point():
            raise ValueError(
                f"{path} holds its weights in 4 bits, which cannot take up {name!r}; "
                "merge it into the model they were rounded from"
            )
    for path, layer in _adapted(model).items():
        if name in layer.adapters:
            adapter = layer.adapters[name]
            A, B = adapter.parameters()
            alpha = adapter.scale * adapter.rank
            layer.base.weight.copy_(merged_weight(layer.base, A, B, alpha))
            del layer.adapters[name]
            layer.on = None if layer.on == name else layer.on
        if not layer.adapters:
            model.set_submodule(path, layer.base)
    if not _adapted(model):
        model.requires_grad_(True)
    return model


def nf4_levels() -> Tensor:
    """The 16 numbers of NF4, from -1 to 1, in order (arXiv 2305.14314, appendix E).

    Quantiles of a normal distribution, seven below 0 and eight above it, so that each
    is used about as often; divided by the largest.
    """
    most = 0.9677083  # the probability below the largest: as in bitsandbytes
    above = torch.special.ndtri(torch.linspace(most, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(most, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([below, torch.zeros(1, dtype=torch.float64), above])
    return (levels.sort().values / above.max()).float()


def to_nf4(x: Tensor, block: int = 64) -> tuple[Tensor, Tensor]:
    """Numbers as 4 bits each: codes 0 to 15 in the shape of x, and a scale per block.

    Of `block` numbers in a row the largest in size is their scale; each is divided by
    it, and the nearest of `nf4_levels` is its code. Raises ValueError if the blocks do
    not come out even.
    """
    if x.numel() % block:
        raise ValueError(f"{x.numel()} numbers are no whole blocks of {block}")
    rows = x.detach().float().reshape(-1, block)
    scales = rows.abs().amax(dim=1)
    levels = nf4_levels().to(x.device)
    middles = (levels[1:] + levels[:-1]) / 2  # nearer to the one above from here on
    codes = torch.bucketize(rows / scales.clamp(min=1e-12)[:, None], middles)
    return codes.view(x.shape), scales


def from_nf4(codes: Tensor, scales: Tensor) -> Tensor:
    """The numbers that codes and scales of `to_nf4` stand for."""
    rows = nf4_levels().to(scales)[codes].reshape(len(scales), -1)
    return (rows * scales[:, None]).view(codes.shape)


def save_adapter(model: nn.Module, name: str, folder):
    """Write an adapter as PEFT does: `PeftModel.from_pretrained` reads the folder.

    Raises ValueError if there is no adapter of this name.
    """
    _check_known(model, name)
    tensors, scales, ranks, transposed = {}, set(), set(), set()
    layers = {k: v for k, v in _adapted(model).items() if name in v.adapters}
    for path, layer in layers.items():
        adapter = layer.adapters[name]
        for part, weight in adapter.named_parameters():
            tensors[f"{PREFIX}{path}.{part}"] = weight.detach().cpu().contiguous()
        ranks.add(adapter.rank)
        scales.add(adapter.scale)
        if not isinstance(layer.base, nn.Embedding):
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
    # Of an embedding PEFT writes the base, too
    names = [name for name in tensors if ".lora_" in name]
    targets = sorted({n.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for n in names})
    layers = _plain_layers(model)
    rank = config["r"]
    for target in targets:
        if target not in layers:
            raise ValueError(
                f"the adapter in {folder} belongs to a layer {target!r}, which this "
                "model does not have; load it into its own base model"
            )
        size_in, size_out = _sizes(layers[target])
        names = ("lora_A.weight", "lora_B.weight")
        if isinstance(layers[target], nn.Embedding):
            names = ("lora_embedding_A", "lora_embedding_B")
        shapes = ((rank, size_in), (size_out, rank))
        for part, shape in zip(names, shapes, strict=True):
            found = tuple(tensors[f"{PREFIX}{target}.{part}"].shape)
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
            for part, weight in adapter.named_parameters():
                weight.copy_(tensors[f"{PREFIX}{target}.{part}"])
    return model
