"""The paged KV cache: tensors and their arithmetic. Who owns which block is `engine.block_pool`'s business."""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.models.config import DecoderConfig

BLOCK_SIZE = 16  # tokens in one block; one vector register of attention scores


@dataclass(frozen=True, slots=True)
class KVCache:
    """Keys and values of all layers.

    Keys are transposed inside a block, so that the scores of 16 tokens come out of one vector register. Kernels with
    tiles use the same memory in pairs, see `engine.kernels.cpu.attention_tiles`.

    Attributes:
        keys: [layers, num_blocks, num_kv_heads, head_dim, BLOCK_SIZE].
        values: [layers, num_blocks, num_kv_heads, BLOCK_SIZE, head_dim].
    """

    keys: Tensor
    values: Tensor

    @classmethod
    def allocate(
        cls, config: DecoderConfig, num_blocks: int, dtype: torch.dtype, device: torch.device | None = None
    ) -> "KVCache":
        """Reserve memory for `num_blocks` blocks; on the CPU, by default, it is handed out when a block is written."""
        heads, dim = config.num_kv_heads, config.head_dim
        return cls(
            torch.empty(config.num_layers, num_blocks, heads, dim, BLOCK_SIZE, dtype=dtype, device=device),
            torch.empty(config.num_layers, num_blocks, heads, BLOCK_SIZE, dim, dtype=dtype, device=device),
        )


def block_bytes(config: DecoderConfig, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers."""
    return 2 * config.num_layers * config.kv_size * BLOCK_SIZE * dtype.itemsize


def blocks_for(num_tokens: int) -> int:
    """Blocks that hold `num_tokens` tokens."""
    return -(-num_tokens // BLOCK_SIZE)
