"""The whole decoder in plain PyTorch: slow, obvious, and what every kernel is tested against."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from engine.activation import apply_activation
from engine.kernels.backend import Backend, rotary_angles
from engine.kv_cache import BLOCK_SIZE
from engine.models.config import LayerWeights
from engine.step import StepInputs


class ReferenceBackend(Backend):
    """Runs everywhere, promises nothing about speed."""

    def forward(self, step: StepInputs) -> Tensor:
        """See `Backend.forward`."""
        self._cos, self._sin = rotary_angles(step.positions, self.weights.rope_inv_freq)
        x = self.weights.embedding[step.token_ids].float()
        self._zeros: list[Tensor] = []
        self._kept: list[Tensor] = []
        for index, layer in enumerate(self.weights.layers):
            x = x + self._attention(index, layer, self._norm(x, layer.input_norm), step)
            x = x + self._feed_forward(index, layer, self._norm(x, layer.post_norm), step)
        zeros, kept = torch.stack(self._zeros).numpy(), torch.stack(self._kept).numpy()
        modes = step.activations.mode.numpy()
        self.sparsity.add(modes, zeros, self.config.intermediate_size)
        self.draws.add(modes, step.activations.threshold.numpy(), zeros, kept)
        self.row_zeros = zeros.sum(0)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Backend.logits`."""
        return functional.linear(self._norm(hidden, self.weights.final_norm), self.weights.lm_head)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm of each row: float32 [rows, hidden] to the same in the type of `weight`."""
        normed = functional.rms_norm(x, (self.config.hidden_size,), weight.float(), self.config.norm_eps)
        return normed.to(weight.dtype)

    def _attention(self, layer: int, weights: LayerWeights, x: Tensor, step: StepInputs) -> Tensor:
        """Attention of one layer, normalised input to output projection; writes the cache before any row attends."""
        config = self.config
        qkv = functional.linear(x, weights.qkv, weights.qkv_bias)
        q, k, v = torch.split(qkv, [config.q_size, config.kv_size, config.kv_size], dim=-1)
        q = q.float().reshape(-1, config.num_heads, config.head_dim)
        k = k.float().reshape(-1, config.num_kv_heads, config.head_dim)
        v = v.reshape(-1, config.num_kv_heads, config.head_dim)
        if weights.q_norm is not None and weights.k_norm is not None:
            q = functional.rms_norm(q, (config.head_dim,), weights.q_norm.float(), config.norm_eps)
            k = functional.rms_norm(k, (config.head_dim,), weights.k_norm.float(), config.norm_eps)
        if config.use_rope[layer]:
            q, k = rotate(q, self._cos, self._sin), rotate(k, self._cos, self._sin)
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        block, offset = step.slots // BLOCK_SIZE, step.slots % BLOCK_SIZE
        keys[block, :, :, offset] = k.to(keys.dtype)
        values[block, :, offset, :] = v.to(values.dtype)
        heads = [
            self._attend(layer, q[row], step.block_tables[step.row_sequence[row]], int(step.positions[row]))
            for row in range(x.shape[0])
        ]
        return functional.linear(torch.stack(heads).to(x.dtype), weights.o, weights.o_bias)

    def _attend(self, layer: int, q: Tensor, block_table: Tensor, position: int) -> Tensor:
        """One row: q [num_heads, head_dim] to [num_heads * head_dim]."""
        config, window = self.config, self.config.sliding_window[layer]
        first = max(0, position + 1 - window) if window is not None else 0
        blocks = block_table[: position // BLOCK_SIZE + 1].long()
        keys = self.cache.keys[layer][blocks].permute(1, 0, 3, 2).flatten(1, 2)[:, first : position + 1].float()
        values = self.cache.values[layer][blocks].permute(1, 0, 2, 3).flatten(1, 2)[:, first : position + 1].float()
        group = config.num_heads // config.num_kv_heads
        keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
        scores = torch.einsum("hd,htd->ht", q, keys) / math.sqrt(config.head_dim)
        return torch.einsum("ht,htd->hd", scores.softmax(-1), values).flatten()

    def _feed_forward(self, layer: int, weights: LayerWeights, x: Tensor, step: StepInputs) -> Tensor:
        """Gated feed-forward of one layer."""
        activated = apply_activation(functional.linear(x, weights.gate), step.activations, layer)
        self._zeros.append((activated == 0).sum(-1))
        self._kept.append((activated < 0).sum(-1))
        return (activated * functional.linear(x, weights.up)) @ weights.down

    def describe(self) -> dict[str, str]:
        """See `Backend.describe`."""
        return {"attention": "PyTorch reference", "feed-forward": "PyTorch reference", "linear": "PyTorch"}


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, first half of a head against its second half.

    Args:
        heads: float32 [rows, heads, head_dim].
        cos: float32 [rows, head_dim / 2].
        sin: Likewise.
    """
    first, second = heads.chunk(2, dim=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
