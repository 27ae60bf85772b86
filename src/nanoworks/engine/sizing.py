"""What an engine's settings come to for one model on one device."""

from __future__ import annotations

import torch

from nanoworks.common.device import memory_bytes
from nanoworks.common.errors import UserError
from nanoworks.engine.block_manager import blocks_in_sight
from nanoworks.engine.config import EngineConfig
from nanoworks.nn import kernels
from nanoworks.nn.kernel_context import BLOCK_SIZE, suits
from nanoworks.nn.paged import KVShape


def for_device(config: EngineConfig, shape: KVShape, device: torch.device) -> EngineConfig:
    """Return `config` with what it leaves to the device, for a model of `shape` on `device`."""
    cpu = device.type == "cpu"
    kernel = cpu and suits(shape, BLOCK_SIZE) and kernels.available()
    chosen = {
        "block_size": config.block_size or (BLOCK_SIZE if kernel else 16),
        "max_batch_tokens": config.max_batch_tokens or (128 if cpu else 2048),
    }
    return config.model_copy(update=chosen)


def cache_blocks(config: EngineConfig, shape: KVShape, context: int, device: torch.device) -> int:
    """Return the number of usable blocks for a model of `shape` whose sequences have at most `context` tokens;
    `config` as from `for_device`."""
    if config.num_blocks is not None:
        return config.num_blocks
    token_bytes = shape.bytes_per_token_int8 if config.kv_dtype == "int8" else shape.bytes_per_token
    block_bytes = token_bytes * config.block_size
    if config.kv_memory is not None:
        blocks = int(config.kv_memory * 2**30) // block_bytes
        if blocks == 0:
            raise UserError(f"kv_memory={config.kv_memory} GiB holds no block of {block_bytes} bytes; give more memory")
        return blocks
    wanted = -(-context // config.block_size)
    if shape.window is not None and not shape.window.token_ids:
        chunk = min(shape.window.size, config.max_batch_tokens)
        wanted = min(wanted, blocks_in_sight(shape.window, chunk, config.block_size))
    ranks = config.tensor_parallel if device.type == "cpu" else 1  # these share the memory
    memory = memory_bytes(device) // 4 // ranks
    return max(1, min(config.max_num_seqs * wanted, memory // block_bytes))
