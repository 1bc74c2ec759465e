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
        self.lengths = [1, length, *between.tolist()]
        self.width, self.n_tokens = length, sum(self.lengths)
        ends = torch.tensor(self.lengths)[:, None]
        self.mask = (torch.arange(length) < ends).long()

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

    def rows(self, *tensors):
        """The real tokens of each response: one list of numbers for each tensor."""
        return [
            [x[b, :n].tolist() for x in tensors] for b, n in enumerate(self.lengths)
        ]

    def table(self, rows):
        """Lists of numbers as a (B, T) tensor, 0 outside the mask."""
        out = torch.zeros(self.mask.shape, dtype=torch.float64)
        for b, row in enumerate(rows):
            out[b, : len(row)] = torch.tensor(row, dtype=torch.float64)
        return out


def mean_of(numbers):
    """The mean of a list of numbers."""
    return sum(numbers) / len(numbers)
