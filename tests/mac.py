"""Tensors that stand for those of a Mac's GPU, which has no float64."""

import torch

MPS = torch.device("mps")


class OnAMac(torch.Tensor):
    """A tensor that says it is on a Mac's GPU, and refuses float64 as that does."""

    device = MPS

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        options = dict(options or {})
        given = [*arguments[1:], *options.values()]
        devices = [torch.device(x) for x in given if isinstance(x, torch.device | str)]
        if function is torch.Tensor.cpu or torch.device("cpu") in devices:
            return arguments[0].as_subclass(torch.Tensor)
        if function is torch.Tensor.double or torch.float64 in given:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        if MPS in devices:
            return arguments[0]
        return super().__torch_function__(function, types, arguments, options)


def on_a_mac(tensor):
    """The tensor, as if it were on a Mac's GPU."""
    return tensor.as_subclass(OnAMac)
