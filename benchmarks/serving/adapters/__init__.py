"""One file for each engine: how it is loaded and asked for tokens. `worker.py` says what an adapter is."""
