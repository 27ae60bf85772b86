"""GGUF files: writing them, and reading them through llama.cpp."""
