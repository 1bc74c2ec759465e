"""Tensors that stand for those of a Mac's GPU, which has no float64."""

import torch


class OnAMac(torch.Tensor):
    """It refuses float64 as that does, also on its way to the CPU."""

    device = torch.device("mps")

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        given = [getattr(x, "dtype", x) for x in arguments[1:]]
        goes = function is torch.Tensor.to
        if function is torch.Tensor.double or goes and torch.float64 in given:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        if function is torch.Tensor.cpu or goes and torch.device("cpu") in given:
            return torch.Tensor(arguments[0].tolist())
        return super().__torch_function__(function, types, arguments, options)


def on_a_mac(tensor):
    """The tensor, as if it were on a Mac's GPU."""
    return tensor.as_subclass(OnAMac)
