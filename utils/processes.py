"""One model on several processes: what each does alone, and what must be everybody's.

`python -m utils --processes 2` (or `accelerate launch -m utils`) starts the same
notebook twice, on a GPU each if there are any. A process samples its share of the
prompts and works out its share of each minibatch; the rollout, the gradient and every
number that decides something are those of all. **In one process nothing here changes
what is computed.** The engine, which starts the processes, wraps the model and
adds the gradients, is accelerate.

The gradient of a mean over all tokens is the sum over the processes of (their tokens /
all tokens) times the gradient of their own mean: weighed alike, a process with few
tokens would count too much. Li et al. 2020, "PyTorch Distributed" (arXiv 2006.15704).
"""

import contextlib
import functools
import inspect
import os
import warnings
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map

# Names the place where the processes meet, which is another one for each notebook: in
# the old one they would find the addresses of kernels that have ended
MEETING = "PROCESSES_MEET_AT"


def n_processes() -> int:
    """How many processes train together; 1 before they have met in `join`."""
    return dist.get_world_size() if _together() else 1


def this_process() -> int:
    """The number of this process, from 0 on; the first one writes to disk."""
    return dist.get_rank() if _together() else 0


def _together():
    return dist.is_available() and dist.is_initialized()


def join(device: str = "auto"):
    """Meet the processes that were started with this one; alone, do nothing.

    `device` is the setting; each process takes a GPU of its own, unless that is "cpu".
    Raises ValueError if there are fewer GPUs than processes, or for DeepSpeed, and
    ImportError without accelerate.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not _together():
        check_gpus(int(os.environ["LOCAL_WORLD_SIZE"]), device)
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            raise ValueError(
                "DeepSpeed steps in its backward pass, before approx_kl could stop it; "
                "take more/accelerate/fsdp2.yaml, which divides what ZeRO-2 does"
            )
        if device == "cpu" or not torch.cuda.is_available():
            os.environ["ACCELERATE_USE_CPU"] = "true"
            os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
        store, rank, n = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(os.environ.get(MEETING, ""), store)
        dist.init_process_group(store=store, rank=rank, world_size=n)
        _accelerator()


def check_gpus(n: int, device: str = "auto"):
    """Raise ValueError if n processes of this machine would have to share a GPU."""
    gpus = torch.cuda.device_count()
    if device != "cpu" and 0 < gpus < n:
        raise ValueError(
            f"{n} processes would share {gpus} GPU{'s' * (gpus > 1)} of this machine; "
            f"start at most {gpus}, or set device to cpu"
        )


def check_shares(n: int, settings):
    """Raise ValueError if a minibatch cannot be shared out evenly."""
    if (size := settings.ppo_minibatch_size) % n:
        raise ValueError(
            f"ppo_minibatch_size ({size}) must be a multiple of the {n} processes; "
            f"{-(-size // n) * n} is one, and ppo_rollout_size then a multiple of that"
        )


@functools.cache
def _accelerator():
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs
    except ImportError as error:
        raise ImportError(
            "several processes need accelerate, which is not installed; "
            "pip install accelerate"
        ) from error
    # What a trunk computes in is `autocast`'s affair, and no model here has a buffer
    # that training changes
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
    return Accelerator(mixed_precision="no", kwargs_handlers=[ddp])


class Work(nn.Module):
    """A model whose forward pass is whatever work is done with it.

    An engine acts before and after the forward pass of the module that it wraps. A
    loss that reads the model's parts one by one would go past it; as the forward pass
    of this module it does not.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, work: Callable):
        """What `work()` gives."""
        return work()


def wrap(model: nn.Module, optimizer: torch.optim.Optimizer, scaled: bool = False):
    """Let the engine add this model's gradients over all processes from now on.

    All have to start from the same weights: DDP sends the first one's, FSDP2 takes a
    part from each. `scaled`: the loss is, since the trunk computes in float16. Alone,
    do nothing.
    """
    if n_processes() == 1:
        return
    with warnings.catch_warnings():  # torch's, of the word for buffers
        warnings.simplefilter("ignore", FutureWarning)
        engine, _ = _accelerator().prepare(Work(model), optimizer)
    _accelerator().free_memory()  # else it keeps each model that it has ever seen
    if type(engine) is Work:
        raise RuntimeError(
            "accelerate adds no gradients on this device; set device to cpu, or to cuda"
        )
    for module in (model, *model.children()):
        object.__setattr__(module, "engine", engine)  # not as a part: it has these
    if _divides(engine):
        if scaled:
            raise ValueError(
                "precision is float16, whose overflows each process would see only in "
                "its part of the gradients (FSDP2); set it to bfloat16 or float32"
            )
        engine.set_reshard_after_backward(False)  # but `divided` does
        engine.unshard()
    # Dropout is another one in each process
    torch.manual_seed(torch.initial_seed() + this_process())


def inside(model: nn.Module, work: Callable, syncs: bool = True):
    """`work()`, as a forward pass of what the engine has wrapped around the model.

    The gradients of all processes are added in its backward pass, with those that
    have gathered since the last time; not yet if `syncs` is false.
    """
    engine = getattr(model, "engine", None)
    if engine is None:
        return work()
    if _divides(engine):  # until the backward pass, which comes after this
        engine.set_requires_gradient_sync(syncs)
        return engine(work)
    waits = contextlib.nullcontext() if syncs else _accelerator().no_sync(engine)
    with waits:
        return engine(work)


def _divides(engine):
    """Whether each process keeps only its part of weights, gradients and moments."""
    if engine is None:
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(engine, FSDPModule)


@contextlib.contextmanager
def divided(model: nn.Module):
    """In this block each process has its part of the weights, as its optimiser has.

    That is, if the engine divides them (FSDP2); outside of it they are whole.
    """
    engine = getattr(model, "engine", None)
    if not _divides(engine):
        yield
        return
    engine.reshard()
    yield
    engine.unshard()


def whole(nest):
    """Dictionaries and lists of tensors, each of them put together from its parts.

    All processes have to ask for it at the same time.
    """
    if n_processes() == 1:
        return nest
    from torch.distributed.tensor import DTensor

    return tree_map(lambda x: x.full_tensor() if isinstance(x, DTensor) else x, nest)


def state_if_divided(model: nn.Module) -> dict:
    """`{"state_dict": …}` of a model whose weights are divided; else `{}`."""
    if not _divides(getattr(model, "engine", None)):
        return {}
    with divided(model):
        return {"state_dict": whole(model.state_dict())}


def divided_like(x: Tensor, weight: Tensor) -> Tensor:
    """This process's part of x, if the weight, of x's shape, is divided."""
    mesh = getattr(weight, "device_mesh", None)
    if mesh is None or x.shape != weight.shape:
        return x
    from torch.distributed.tensor import distribute_tensor

    x = x.to(weight.device)
    return distribute_tensor(x, mesh, weight.placements, src_data_rank=None)


def bytes_sent(gradients: float, n: int) -> float:
    """What each of n processes sends a step, to add gradients of so many bytes.

    2 (n - 1) / n times as many, around a ring: Patarasuk and Yuan 2009, "Bandwidth
    optimal all-reduce algorithms for clusters of workstations".
    """
    return 2 * (n - 1) / n * gradients


def own_share(n: int) -> slice:
    """Which of n rows are this process's: runs in order, that differ by one at most."""
    rank, processes = this_process(), n_processes()
    return slice(rank * n // processes, (rank + 1) * n // processes)


def even_share(lengths: Tensor) -> Tensor:
    """Which rows are this process's, so that all have about as many tokens to read.

    Of the rows (B,) from the shortest to the longest every n-th one.
    """
    return lengths.argsort(stable=True)[this_process() :: n_processes()]


def everybodys(figures: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums of figures over all processes, and the largest of what ends in `_max`."""
    if n_processes() == 1:
        return figures
    mine = torch.stack([x.detach().double() for x in figures.values()])
    found = [torch.empty_like(mine) for _ in range(n_processes())]
    dist.all_gather(found, mine)
    together = zip(figures.items(), torch.stack(found, dim=1), strict=True)
    return {
        name: (values.max() if name.endswith("_max") else values.sum()).to(x.dtype)
        for (name, x), values in together
    }


def shared(rows: str) -> Callable:
    """A decorator: each process is given its share of the argument `rows`.

    The first argument of the function is the model. What it returns becomes
    everybody's: a tensor with a row for each row it was given, or a class with the
    method `joined`, of all processes in order; a tuple of numbers, summed. The gradient
    is that of this process's part; the engine adds the others. A generator among the
    arguments stays the same in all processes, and each draws from one of its own. In
    one process the function runs as it is.
    """

    def decorate(function):
        signature = inspect.signature(function)

        @functools.wraps(function)
        def run(*args, **kwargs):
            if n_processes() == 1:
                return function(*args, **kwargs)
            bound = signature.bind(*args, **kwargs)
            given = bound.arguments
            model, everything = next(iter(given.values())), given[rows]
            own = everything[own_share(len(everything))]
            given[rows] = own if len(own) else everything[:1]  # all take part
            for name, value in given.items():
                if isinstance(value, torch.Generator):
                    given[name] = _own_generator(value)
            mine = inside(model, lambda: function(*bound.args, **bound.kwargs))
            return _of_all(mine, len(own))

        return run

    return decorate


def _own_generator(generator):
    drawn = torch.randint(2**60, (), generator=generator, device=generator.device)
    own = torch.Generator(generator.device)
    return own.manual_seed(drawn.item() + this_process())


def _of_all(mine, n_rows):
    """What all processes found, of which this one did n_rows."""
    if isinstance(mine, tuple):
        return tuple(_with_own_gradient(x, n_rows) for x in mine)
    if isinstance(mine, Tensor):
        parts = [part.to(mine.device) for part in gather(mine.detach().cpu()[:n_rows])]
        parts[this_process()] = mine[:n_rows]
        return torch.cat(parts)
    parts = gather(mine.rows(torch.arange(n_rows)).to("cpu"))
    return type(mine).joined(parts).to(mine.mask.device)


def _with_own_gradient(x, n_rows):
    x = x * bool(n_rows)
    total = x.detach().clone()
    dist.all_reduce(total)
    return total + (x - x.detach()) if x.requires_grad else total


def gather(thing) -> list:
    """This thing of each process, in order; tensors in the CPU's memory."""
    found = [None] * n_processes()
    if _together():
        dist.all_gather_object(found, thing)
        return found
    return [thing]


def from_the_first(thing):
    """The first process's thing: where rounding might make others decide otherwise."""
    return gather(thing)[0]


@contextlib.contextmanager
def first_goes_first() -> Iterator[bool]:
    """The first process goes through this block, which it writes in; then the others.

    Gives whether this is the first one. Nothing in it may need the other processes.
    """
    if n_processes() == 1:
        yield True
        return
    with _accelerator().main_process_first():
        yield this_process() == 0
