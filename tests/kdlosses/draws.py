"""Random tensors on the default device, the same numbers on every device."""

import torch


class Draws:
    """Draws on the CPU from a seed, then moves to the default device."""

    def __init__(self, seed):
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape):
        drawn = torch.randn(*shape, generator=self._generator, device="cpu")
        return drawn.to(torch.get_default_device())

    def integers(self, stop, *shape):
        drawn = torch.randint(stop, shape, generator=self._generator, device="cpu")
        return drawn.to(torch.get_default_device())


def generator(seed):
    """A generator for draws on the default device; the simulated one draws on the CPU."""
    device = torch.get_default_device()
    made = torch.Generator("cpu" if device.type == "simulated" else device)
    return made.manual_seed(seed)
