"""`python -m nanoworks.nn.kernels`: build the kernels and say whether they work."""

import logging

from nanoworks.nn import kernels

logging.basicConfig(level=logging.INFO, format="%(message)s")
print(kernels.why_not() or "the CPU kernels work")
