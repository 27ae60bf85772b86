"""How a model is spread over devices, applied from outside; the trainer sees only `Strategy`."""

from nanoworks.parallel.starting import log_failure, log_to_file, open_strategy, own_device, restarted
from nanoworks.parallel.strategy import SingleDevice, Strategy

__all__ = ["SingleDevice", "Strategy", "log_failure", "log_to_file", "open_strategy", "own_device", "restarted"]
