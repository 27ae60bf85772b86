"""One file for each group of paths, each with its `router`."""
