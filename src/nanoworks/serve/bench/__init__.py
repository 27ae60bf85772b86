"""The load generator of `nanoworks bench serve`: any OpenAI endpoint under load, what clients felt, what to turn.

It shares nothing with the server: it speaks HTTP and reads /metrics, so it can run on another machine.
"""

from nanoworks.serve.bench.advice import Advice, advise
from nanoworks.serve.bench.load import Lengths, Load
from nanoworks.serve.bench.run import Run, run_load
from nanoworks.serve.bench.summary import Summary, summarize

__all__ = ["Advice", "Lengths", "Load", "Run", "Summary", "advise", "run_load", "summarize"]
