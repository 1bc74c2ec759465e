"""What stands around every training loop: device, precision, and a guarded step."""

import contextlib

import torch
from torch import nn

from utils import check_code_is_current


def get_device(settings) -> torch.device:
    """The device that the settings name; with `auto`, a CUDA GPU or else the CPU.

    Raises ValueError if the device that is named is not there.
    """
    name, cuda = settings.device, torch.cuda.is_available()
    if (name == "cuda" and not cuda) or (
        name == "mps" and not torch.backends.mps.is_available()
    ):
        raise ValueError(f"PyTorch finds no device {name!r} here; set device to 'auto'")
    return torch.device({"auto": "cuda" if cuda else "cpu"}.get(name, name))


def trunk_dtype(settings, device: torch.device) -> torch.dtype:
    """The precision of the trunk: what `precision` says, or the device's best.

    bfloat16 where a GPU has it in hardware, else float16, which is fast on Colab's T4.
    """
    if settings.precision != "auto":
        return getattr(torch, settings.precision)
    if device.type != "cuda":
        return torch.float32
    has_it = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_it else torch.float16


def autocast(settings, device: torch.device):
    """A context in which the trunk computes in its precision."""
    dtype = trunk_dtype(settings, device)
    half = dtype != torch.float32
    return torch.autocast(device.type, dtype) if half else contextlib.nullcontext()


class GuardedOptimizer:
    """An optimiser, and what stands around each of its steps.

    It scales the loss where the trunk computes in float16, whose small gradients would
    be rounded to 0; bounds the norm of the gradients by 1; and checks that no loss and
    no gradient is NaN or infinite. RuntimeError if a file of `utils` was edited since.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, settings):
        check_code_is_current()
        self.model, self.optimizer, self.settings = model, optimizer, settings
        self.device = next(model.parameters()).device
        scaled = trunk_dtype(settings, self.device) == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)

    def resume(self):
        """Forget that a step was interrupted: the scaler would refuse the next one."""
        # The scaler has no scale before it has seen a loss
        self.scaler.scale(torch.zeros((), device=self.device))
        self.scaler.update(self.scaler.get_scale())

    def zero_grad(self):
        """Forget the gradients."""
        self.optimizer.zero_grad()

    def backward(self, loss: torch.Tensor):
        """Add the gradients of this loss to those that are there."""
        self.scaler.scale(loss).backward()

    def step(self, **figures: torch.Tensor) -> bool:
        """One step against the gradient, whose norm is clipped at 1; was it taken?

        `figures` are the losses and statistics of this step, by name. With loss scaling
        a gradient may overflow: the scaler then leaves this step out and lowers its
        scale, and only a scale below 1 shows that something else is wrong. Raises
        FloatingPointError, before a weight has changed, if anything else is not finite.
        """
        self.scaler.unscale_(self.optimizer)
        weights = [w for w in self.model.parameters() if w.grad is not None]
        norm = torch.nn.utils.get_total_norm([w.grad for w in weights])
        # All in one check, since each makes the CPU wait for a GPU
        numbers = [x.detach().float().flatten() for x in (norm, *figures.values())]
        finite = torch.cat(numbers).isfinite().all().item()
        if not finite:
            if not self.scaler.is_enabled() or self.scaler.get_scale() < 1:
                figures |= {"norm of the gradients": norm}
            for name, x in figures.items():
                if not x.isfinite().all():
                    value = x[~x.isfinite()][0].item()
                    raise FloatingPointError(
                        f"the {name.replace('_', ' ')} is {value}; this step was not "
                        "taken: lower the learning rate, or set precision to float32, "
                        "and run again from the first cell"
                    )
        torch.nn.utils.clip_grads_with_norm_(weights, 1.0, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return finite

    def state_dict(self) -> dict:
        """What a step depends on beside the weights."""
        parts = {"optimizer": self.optimizer, "scaler": self.scaler}
        return {name: part.state_dict() for name, part in parts.items()}

    def load_state_dict(self, state: dict):
        """Put back what `state_dict` gave."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
