"""What every training loop does and no lesson is about: device, precision, one step."""

import contextlib
import random
import warnings
from collections.abc import Callable
from functools import partial
from itertools import count

import torch
from torch import nn

import utils
from utils.processes import (
    divided,
    divided_like,
    even_share,
    everybodys,
    inside,
    n_processes,
    whole,
    wrap,
)
from utils.settings import Settings


def seed_everything(seed: int):
    """Seed Python and torch (CPU and GPU), so that a cell can be repeated."""
    random.seed(seed)
    torch.manual_seed(seed)


def default_preset() -> str:
    """`full` where there is a CUDA GPU, else `tiny`; prints how to get `full` then."""
    if torch.cuda.is_available():
        return "full"
    print(
        "no CUDA GPU, so this is the preset 'tiny': a small generated world. For\n"
        "GPT-2 on SST-2: on Colab, Runtime > Change runtime type > T4 GPU; anywhere,\n"
        'PRESET = "full" in the first cell (hours on a CPU)'
    )
    return "tiny"


def get_device(settings: Settings) -> torch.device:
    """The device that the settings name, or the GPU if there is one, else the CPU.

    A Mac's GPU (mps) only where it is named. Warns if the CPU will be slow; raises
    ValueError if the device that is named is not there.
    """
    wanted = settings.device
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if not there.get(wanted, True):
        raise ValueError(
            f"device is {wanted!r}, and PyTorch finds none here; set it to "
            "auto, or install the build of PyTorch that is made for it"
        )
    if wanted in there:
        return torch.device(wanted)
    if wanted == "auto" and there["cuda"]:
        return torch.device("cuda")
    if settings.preset == "full" and wanted == "auto":
        warnings.warn(
            "no CUDA GPU found: on a CPU the preset 'full' takes hours per notebook "
            "(an estimate). On Colab choose Runtime > Change runtime type > T4 GPU; "
            "anywhere, the preset 'tiny' runs in minutes. Going on with the CPU.",
            stacklevel=2,
        )
    return torch.device("cpu")


def trunk_dtype(settings: Settings, device: torch.device) -> torch.dtype:
    """The precision of the trunk: what `precision` says, or the device's best.

    bfloat16 where a GPU has it, else float16, which is fast on Colab's T4: there, and
    on AMD's older ones, bfloat16 would only be emulated.
    """
    if settings.precision != "auto":
        return getattr(torch, settings.precision)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if _has_bfloat16(device) else torch.float16


def _has_bfloat16(device):
    if not torch.version.hip:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Of AMD's, torch says yes for all; those that do it in hardware by their names
    name = torch.cuda.get_device_properties(device).gcnArchName
    return name.startswith(("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12"))


def autocast(settings: Settings, device: torch.device):
    """A context in which the trunk computes in its precision."""
    dtype = trunk_dtype(settings, device)
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def check_code_is_current():
    """Raise RuntimeError if a file of `utils` has changed since it was imported.

    The kernel would go on with the old code, while the new one is shown.
    """
    if changed := utils.changed_files():
        raise RuntimeError(
            f"{' and '.join(changed)} changed after this kernel had imported the old "
            "version, which would run on; restart the kernel, and run the cells again"
        )


class GuardedOptimizer:
    """An optimiser with what stands around a step: zero_grad, backward, step.

    Loss scaling where the trunk computes in float16, whose small gradients would be
    rounded to 0; a bound on the norm of the gradients; and a look that no loss and no
    gradient is NaN or infinite. On several processes the gradients are those of all
    (`utils/processes.py`). Raises RuntimeError if a file of `utils` was edited since it
    was imported.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        settings: Settings,
        max_grad_norm: float = 1.0,
    ):
        check_code_is_current()
        self.model, self.optimizer = model, optimizer
        self.max_grad_norm = max_grad_norm
        self.device = next(model.parameters()).device
        scaled = trunk_dtype(settings, self.device) == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)
        wrap(model, optimizer, scaled)

    def resume(self):
        """Go on after a step that may have been interrupted, as if it had not begun.

        The loss scaling would refuse the next step otherwise. Its scale stays. Raises
        RuntimeError as the constructor does.
        """
        check_code_is_current()
        # There is no scale before the first loss
        self.scaler.scale(torch.zeros((), device=self.device))
        self.scaler.update(self.scaler.get_scale())

    def zero_grad(self):
        """Forget the gradients."""
        self.optimizer.zero_grad()

    def backward(self, loss: torch.Tensor):
        """Add the gradients of this loss to those that are there."""
        # The engine gives the mean over the processes, and theirs are parts of a sum
        self.scaler.scale(loss * n_processes()).backward()

    def step(self, **figures: torch.Tensor):
        """One step along the gradients.

        `figures` are the losses and statistics of this step, by name. Raises
        FloatingPointError, before a weight has changed, if one of them or a gradient
        is not finite: see `clip_gradients`.
        """
        with divided(self.model):
            self.scaler.unscale_(self.optimizer)
            clip_gradients(self.model, self.max_grad_norm, self.scaler, figures)
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def state_dict(self) -> dict:
        """What a step depends on beside the weights."""
        states = {"optimizer": self.optimizer, "scaler": self.scaler}
        return {name: whole(part.state_dict()) for name, part in states.items()}

    def load_state_dict(self, state: dict):
        """Put back what `state_dict` gave."""
        weights = [p for group in self.optimizer.param_groups for p in group["params"]]
        of_weights = {
            i: {name: divided_like(x, weights[i]) for name, x in one.items()}
            for i, one in state["optimizer"]["state"].items()
        }
        self.optimizer.load_state_dict({**state["optimizer"], "state": of_weights})
        self.scaler.load_state_dict(state["scaler"])


def accumulate_gradients(
    loss: Callable, model: nn.Module, batch, optimizer: GuardedOptimizer, settings
) -> dict[str, torch.Tensor]:
    """The gradients of `loss(model, batch, settings)`, worked out piece by piece.

    The loss is a mean over the batch's response tokens, and comes with its figures, by
    name. Each piece (a micro-batch, of `ppo_micro_batch_size`) weighs as much as its
    share of the tokens, so that the sum is that of the whole batch. Several processes
    share the batch's rows among them. Returns the figures of the whole batch: means,
    and the largest of what ends in `_max`.
    """
    figures, size = {}, settings.ppo_micro_batch_size
    mine = batch if n_processes() == 1 else batch.rows(even_share(batch.lengths))
    for end, piece in zip(count(size, size), mine.pieces(size), strict=False):
        share = piece.n_tokens / batch.n_tokens
        value, found = inside(
            model, partial(loss, model, piece, settings), syncs=end >= len(mine)
        )
        optimizer.backward(value * share)
        for name, x in found.items():
            if name.endswith("_max"):
                figures[name] = torch.maximum(figures.get(name, x), x).detach()
            else:
                figures[name] = (figures.get(name, 0) + x * share).detach()
    return everybodys(figures)


def clip_gradients(
    model: nn.Module,
    max_norm: float,
    scaler: torch.amp.GradScaler,
    figures: dict[str, torch.Tensor],
):
    """`torch.nn.utils.clip_grad_norm_`, which lets no NaN and no infinity pass.

    With loss scaling a gradient may overflow: the scaler then leaves this step out and
    lowers its scale, and only a scale below 1 shows that something else is wrong.
    Raises FloatingPointError, and names the figure or the weight, if anything else is
    not finite; nothing is clipped then.
    """
    weights = {n: p for n, p in model.named_parameters() if p.grad is not None}
    norm = torch.nn.utils.get_total_norm([p.grad for p in weights.values()])
    # Looked at all together, since the CPU waits for a GPU at each look
    looked_at = (x.detach().to(norm.device) for x in (whole(norm), *figures.values()))
    # A Mac's GPU has no float64, and then no number is of that type
    widest = torch.float32 if norm.device.type == "mps" else torch.float64
    numbers = [x.to(widest).flatten() for x in looked_at]
    if not torch.cat(numbers).isfinite().all():
        for name, value in figures.items():
            if not value.isfinite().all():
                value = value[~value.isfinite()][0]
                raise _not_finite(f"the {name.replace('_', ' ')}", value)
        grads = {name: whole(p.grad) for name, p in weights.items()}
        bad = {name: grad for name, grad in grads.items() if not grad.isfinite().all()}
        if not bad or not scaler.is_enabled() or scaler.get_scale() < 1:
            name, grad = next(iter(bad.items()), ("all weights together", whole(norm)))
            value = grad[~grad.isfinite()][0]
            many = f" (and of {len(bad) - 1} other weights)" if len(bad) > 1 else ""
            raise _not_finite(f"the gradient of {name}{many}", value)
    torch.nn.utils.clip_grads_with_norm_(weights.values(), max_norm, norm)


def _not_finite(what, value):
    return FloatingPointError(
        f"{what} is {value.item()}, so this step was not taken and the weights are "
        "those of the step before; lower the learning rate, or set precision to "
        "float32, and run the notebook again from its first cell"
    )
