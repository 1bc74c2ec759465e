"""Guards around a training step: numbers that are not finite, memory that runs out."""

import traceback

import torch
from IPython import get_ipython
from torch import nn

# What takes memory while each artefact is made
NUMBERS_TO_LOWER = {
    "sft": ("sft_batch_size",),
    "reward_model": ("rm_batch_size",),
    "policy": (
        *("ppo_micro_batch_size", "ppo_minibatch_size", "ppo_rollout_size"),
        "max_new_tokens",
    ),
}


def clip_gradients(
    model: nn.Module,
    max_norm: float,
    scaler: torch.amp.GradScaler,
    *stats: dict[str, torch.Tensor],
):
    """`torch.nn.utils.clip_grad_norm_`, which lets no NaN and no infinity pass.

    `stats` hold the losses and figures of this step, by name, as scalars. With loss
    scaling (float16) a gradient may overflow: the scaler then leaves this step out and
    lowers its scale, and only a scale below 1 shows that something else is wrong.
    Raises FloatingPointError, and names the figure or the weight, if anything else is
    not finite; nothing was changed then, and the gradients are as they came.
    """
    weights = {n: p for n, p in model.named_parameters() if p.grad is not None}
    norm = torch.nn.utils.get_total_norm([p.grad for p in weights.values()])
    named = [(name, value) for figures in stats for name, value in figures.items()]
    # One look at all of them, since a look makes the CPU wait for a GPU
    numbers = torch.stack([value.detach().double() for _, value in named])
    bad_figure, bad_norm = (~numbers.isfinite()).any(), ~norm.isfinite()
    if bad_figure | bad_norm:
        if bad_figure:
            name, value = next((n, v) for n, v in named if not v.isfinite())
            raise _not_finite(f"the {name.replace('_', ' ')}", value)
        bad = {n: p.grad for n, p in weights.items() if not p.grad.isfinite().all()}
        if not bad or not scaler.is_enabled() or scaler.get_scale() < 1:
            name, grad = next(iter(bad.items()), ("all weights together", norm))
            value = grad[~grad.isfinite()][0]
            many = f" (and of {len(bad) - 1} other weights)" if len(bad) > 1 else ""
            raise _not_finite(f"the gradient of {name}{many}", value)
    torch.nn.utils.clip_grads_with_norm_(weights.values(), max_norm, norm)


def _not_finite(what, value):
    return FloatingPointError(
        f"{what} is {value.item()}, so this step was not taken and the weights are "
        "those of the step before; lower the learning rate, or set precision to "
        "float32, and run the notebook again from its settings cell"
    )


def forget_half_step(scaler: torch.amp.GradScaler, device: torch.device):
    """Let loss scaling go on after a step that was interrupted, as if it had not begun.

    In float16 the scaler would refuse the next step otherwise. Its scale stays.
    """
    scaler.scale(torch.zeros((), device=device))  # there is no scale before the first
    scaler.update(scaler.get_scale())


def advise_on_memory(settings, artefact: str):
    """From now on, a GPU that is full ends a cell with the numbers to lower.

    Only in a notebook. `artefact` is what this one makes. What the failed cell held on
    the GPU is freed, so that it can be run again.
    """
    if (shell := get_ipython()) is None:
        return
    numbers = [f"{n} ({getattr(settings, n)})" for n in NUMBERS_TO_LOWER[artefact]]
    advice = (
        f"the GPU's memory is full; lower {' or '.join(numbers)} "
        "(as RLHF_... in the environment), and run again from the settings cell"
    )

    def advise(shell, kind, error, trace, tb_offset=None):
        traceback.clear_frames(trace)  # they hold the tensors
        torch.cuda.empty_cache()
        error.args = (advice,)
        error._render_traceback_ = lambda: [f"{kind.__name__}: {advice}"]
        shell.showtraceback((kind, error, trace), tb_offset=tb_offset)

    shell.set_custom_exc((torch.OutOfMemoryError,), advise)
