"""How a model is spread over devices, applied from outside; the trainer sees only `Strategy`."""

from nanoworks.parallel.strategy import SingleDevice, Strategy

__all__ = ["SingleDevice", "Strategy"]
