"""The random responses that the checks are made on."""

import torch


class Case:
    """Random responses: one ends at once, one never does, the others in between.

    What stands outside the mask is as large as what stands inside, so that a slot
    too many shows.
    """

    def __init__(self, seed, batch=5, length=7):
        self.generator = torch.Generator().manual_seed(seed)
        between = torch.randint(2, length, (batch - 2,), generator=self.generator)
        self.lengths = torch.tensor([1, length, *between.tolist()])
        self.mask = (torch.arange(length) < self.lengths[:, None]).long()

    def normal(self, *shape):
        """Normal numbers of this shape, or one for each slot."""
        shape = shape or self.mask.shape
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def integers(self, low, high, shape):
        """Whole numbers from `low` to below `high`."""
        return torch.randint(low, high, shape, generator=self.generator)

    def uniform(self, low, high):
        """A number between `low` and `high`."""
        return low + (high - low) * torch.rand((), generator=self.generator).item()
