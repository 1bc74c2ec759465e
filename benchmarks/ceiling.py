"""How fast this machine multiplies matrices, and how close an update comes to it."""

import statistics
import time
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import ours
from benchmarks.work import Watch, run_ppo

PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


def seconds_of(function, device, repeats=5) -> float:
    """The median time of a call."""
    times = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def rate(device, n, m, k) -> float:
    """Operations a second of a float32 product (n, k) x (k, m) into ready memory."""
    a, b = torch.randn(n, k, device=device), torch.randn(k, m, device=device)
    out = torch.empty(n, m, device=device)
    return 2 * n * m * k / seconds_of(lambda: torch.mm(a, b, out=out), device)


class Products(TorchDispatchMode):
    """Counts the matrix products by their shapes and strides."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function in PRODUCTS:
            a, b = arguments[-2:]
            layout = tuple((tuple(x.shape), tuple(x.stride())) for x in (a, b))
            self.found[layout] += 1
        return function(*arguments, **(options or {}))


def times_of(layout, device) -> tuple[float, float]:
    """The time of one product of these shapes and strides: as it is called, and into
    memory that is ready.
    """
    a, b = (torch.empty_strided(*x, device=device).normal_() for x in layout)
    out = torch.empty(len(a), b.shape[1], device=device)
    fresh = seconds_of(lambda: torch.mm(a, b), device, repeats=3)
    return fresh, seconds_of(lambda: torch.mm(a, b, out=out), device, repeats=3)


def ceiling(work) -> dict:
    """The machine's best rate, and how long an update's products take on their own."""
    device, config, products = work.device, work.reference.config, Products()

    class Counting(Watch):
        """Counts the products of the update."""

        def timed(self, phase, function):
            def counted(*arguments, **options):
                with products:
                    return function(*arguments, **options)

            return super().timed(phase, counted if phase == "update" else function)

    run_ppo(ours.ppo, work, 1, Counting)
    updates = [one["update"] for one in run_ppo(ours.ppo, work, 3)["rollouts"][1:]]
    fresh, ready = 0.0, 0.0
    for layout, n in products.found.items():
        one = times_of(layout, device)
        fresh, ready = fresh + n * one[0], ready + n * one[1]
    words, width = config.vocab_size, config.hidden_size
    shapes = [(2048, 2048, 2048), (words, 960, width), (960, 1024, width)]
    return {
        "rate": max(rate(device, *shape) for shape in shapes),
        "update_seconds": statistics.median(updates),
        "products_seconds": fresh,
        "products_seconds_ready": ready,
    }
