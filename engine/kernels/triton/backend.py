"""The GPU backend: Triton kernels, decoding steps replayed as CUDA graphs."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.activation import PositiveBranch
from engine.ffn_router import FfnCosts
from engine.kernels.backend import Backend
from engine.kernels.triton.attention import AttentionWorkspace, paged_attention, tokens_per_tile
from engine.kernels.triton.buffers import DeviceStep, StepBuffers
from engine.kernels.triton.costs import ffn_costs
from engine.kernels.triton.counters import DeviceCounters
from engine.kernels.triton.feed_forward import feed_forward
from engine.kernels.triton.feed_forward import scratch_bytes as feed_forward_bytes
from engine.kernels.triton.graphs import CudaRecorder, DecodeGraphs, Recorder, Variant, ladder, padded, run_each_time
from engine.kernels.triton.linear import launch_reduce, linear, scratch_bytes, split_sums
from engine.kernels.triton.norm import embed, rms_norm
from engine.kernels.triton.rotary import RotaryTable, rotate_and_cache
from engine.kernels.triton.sampler import TritonSampler, score_tokens
from engine.kernels.triton.tuning import ROW_TILE, Layout
from engine.kernels.triton.workspace import Workspace
from engine.kv_cache import KVCache, blocks_for
from engine.models.config import DecoderConfig, DecoderWeights, LayerWeights
from engine.step import StepInputs

WARM_UP_ROWS = 16  # that a step may have in any case


@dataclass(frozen=True, slots=True)
class StepLimits:
    """What steps may need at most.

    Attributes:
        rows: Token rows of a step.
        sequences: Sequences of a step.
        tokens: Tokens of a sequence.
    """

    rows: int
    sequences: int
    tokens: int


class TritonBackend(Backend):
    """See the modules beside this one for the kernels.

    All memory of a step is allocated here, once. Hidden states and logits lie in it, valid until the next step.

    Args:
        config: The decoder's shape.
        weights: On the device of the cache.
        cache: On a GPU; or on the CPU, if Triton interprets.
        limits: Of all steps to come.
        recorder: Records decoding steps; None is CUDA graphs on a GPU and nothing elsewhere.
    """

    def __init__(
        self,
        config: DecoderConfig,
        weights: DecoderWeights,
        cache: KVCache,
        *,
        limits: StepLimits,
        recorder: Recorder | None = None,
    ) -> None:
        super().__init__(config, weights, cache)
        device, dtype = cache.keys.device, weights.embedding.dtype
        rows, sequences = max(limits.rows, WARM_UP_ROWS), max(limits.sequences, WARM_UP_ROWS)
        self.sparsity = self._counters = DeviceCounters(config.num_layers, config.intermediate_size, device)
        self._sampler = TritonSampler()
        self._layers = weights.layers
        self._angles = RotaryTable.make(weights.rope_inv_freq, limits.tokens, device)
        self._tile_tokens = tokens_per_tile(config.num_heads // config.num_kv_heads)
        self._attention = AttentionWorkspace(
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            max_tokens=limits.tokens,
            max_rows=rows,
            device=device,
        )
        self._workspace = Workspace(_scratch(config, weights), device)
        self._inputs = StepBuffers(rows=rows, sequences=sequences, blocks=blocks_for(limits.tokens), device=device)

        def empty(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(*shape, dtype=of, device=device)

        self._x = empty(rows, config.hidden_size)
        self._normed = empty(rows, config.hidden_size, of=dtype)
        self._qkv = empty(rows, config.q_size + 2 * config.kv_size)
        self._q = empty(rows, config.num_heads, config.head_dim, of=dtype)
        self._attended = empty(rows, config.q_size, of=dtype)
        self._zeros = empty(config.num_layers, rows, of=torch.int32)
        # Pinned on a GPU: each step's sums arrive in the device's own time, and before the step's tokens.
        self._seen_zeros = torch.empty(rows, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._logits = empty(sequences, config.vocab_size)
        if recorder is None:
            recorder = CudaRecorder() if device.type == "cuda" else run_each_time
        self._graphs = DecodeGraphs(self._decode, ladder(limits.sequences), recorder)
        self._replayed: Tensor | None = None  # hidden states whose logits the replay has made, too

    def prepare(self, positive_branch: PositiveBranch, *, may_skip: bool) -> None:
        """See `Backend.prepare`: record all decoding steps that can come, compile what prompts need."""
        skipping = (False, True) if may_skip else (False,)
        with torch.inference_mode():
            self._graphs.prepare(skip_zeros=skipping, positive_branch=positive_branch)
            if self.cache.keys.is_cuda:
                # Nothing is loaded yet, so all rows are padding. Kernels differ by powers of two of rows, up to a tile.
                sizes = (*ladder(ROW_TILE), ROW_TILE + 1)
                for rows in (size for size in sizes if size <= self._inputs.rows):
                    for skip in skipping:
                        self._run(self._device_step(rows, rows, positive_branch), skip)

    def forward(self, step: StepInputs) -> Tensor:
        """See `Backend.forward`; valid until the next call."""
        rows = len(step.token_ids)
        branch = step.activations.positive_branch
        # One row to a sequence: a decoding step, whatever it computes.
        size = padded(rows, self._graphs.sizes) if rows == len(step.block_tables) else None
        tiles = self._inputs.load(step, tokens_per_tile=self._tile_tokens, padded=size or rows)
        hidden = self._x[:rows]
        if size is None:
            self._run(self._device_step(rows, tiles, branch), step.skip_zeros)
            self._replayed = None
        else:
            self._graphs.run((size, step.skip_zeros, branch))
            self._replayed = hidden
        self._counters.add_rows(self._zeros, self._device_step(rows, tiles, branch).activations.mode)
        self._seen_zeros[:rows].copy_(self._zeros[:, :rows].sum(0), non_blocking=True)
        self.row_zeros = self._seen_zeros[:rows].numpy()
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Backend.logits`."""
        count = len(hidden)
        if hidden is self._replayed:
            return self._logits[:count]
        fits = count <= len(self._logits)
        out = self._logits[:count] if fits else hidden.new_empty(count, self.config.vocab_size)
        self._project(hidden, out)
        return out

    def _decode(self, variant: Variant) -> None:
        """One decoding step with the logits of all its rows."""
        rows, skip_zeros, branch = variant
        self._run(self._device_step(rows, rows, branch), skip_zeros)
        self._project(self._x[:rows], self._logits[:rows])

    def _device_step(self, rows: int, tiles: int, branch: PositiveBranch) -> DeviceStep:
        programs = self._attention.programs(tiles, rows)
        return self._inputs.step(rows=rows, tiles=tiles, programs=programs, positive_branch=branch)

    def _run(self, step: DeviceStep, skip_zeros: bool) -> None:
        """All layers."""
        rows = len(step.token_ids)
        x, normed, eps = self._x[:rows], self._normed[:rows], self.config.norm_eps
        embed(step.token_ids, self.weights.embedding, out=x)
        addend = None  # what a block leaves to the norm that follows it
        for index, layer in enumerate(self._layers):
            rms_norm(x, layer.input_norm, eps, out=normed, addend=addend)
            addend = self._attend(index, step)
            rms_norm(x, layer.post_norm, eps, out=normed, addend=addend)
            addend = feed_forward(
                normed,
                layer.gate,
                layer.up,
                layer.down,
                step.activations,
                index,
                skip_zeros=skip_zeros,
                workspace=self._workspace,
                out=x,
                zeros=self._zeros[index, :rows],
                defer=True,
            )
        if addend is not None:
            launch_reduce(addend, x, add=True)

    def _attend(self, index: int, step: DeviceStep) -> Tensor | None:
        """Attention of one layer, normalised input to residual stream; returns what is still to be added to that."""
        rows, layer, config = len(step.token_ids), self._layers[index], self.config
        keys, values = self.cache.keys[index], self.cache.values[index]
        q, attended = self._q[:rows], self._attended[:rows]
        rotate_and_cache(
            self._qkv_of(layer, rows),
            step.positions,
            step.slots,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            eps=config.norm_eps,
            table=self._angles if config.use_rope[index] else None,
            q=q,
            keys=keys,
            values=values,
        )
        paged_attention(
            q,
            keys,
            values,
            step.block_tables,
            step.row_sequence,
            step.positions,
            step.tiles,
            window=config.sliding_window[index],
            workspace=self._attention,
            out=attended,
        )
        sums = split_sums(attended, layer.o, workspace=self._workspace) if layer.o_bias is None else None
        if sums is None:
            linear(attended, layer.o, layer.o_bias, out=self._x[:rows], add=True, workspace=self._workspace)
        return sums

    def _qkv_of(self, layer: LayerWeights, rows: int) -> Tensor:
        """Queries, keys and values of the normalised input, [splits, rows, q_size + 2 * kv_size]."""
        normed, qkv = self._normed[:rows], self._qkv[:rows]
        sums = split_sums(normed, layer.qkv, workspace=self._workspace) if layer.qkv_bias is None else None
        if sums is None:
            sums = linear(normed, layer.qkv, layer.qkv_bias, out=qkv, workspace=self._workspace)[None]
        return sums

    def _project(self, hidden: Tensor, out: Tensor) -> None:
        """Hidden states to logits."""
        normed = self._normed[: len(hidden)]
        rms_norm(hidden, self.weights.final_norm, self.config.norm_eps, out=normed)
        linear(normed, self.weights.lm_head, out=out, workspace=self._workspace)

    def score(self, logits: Tensor, token_ids: Tensor) -> NDArray[np.float32]:
        """See `Backend.score`."""
        return score_tokens(logits, token_ids)

    def measure_ffn_costs(self) -> FfnCosts | None:
        """See `Backend.measure_ffn_costs`; from the device's table, else measured. None where Triton interprets."""
        return ffn_costs(self._layers, self._workspace) if self.cache.keys.is_cuda else None

    def describe(self) -> dict[str, str]:
        """See `Backend.describe`."""
        replayed = "CUDA graphs" if self.cache.keys.is_cuda else "interpreted"
        return {
            "attention": "Triton, paged",
            "feed-forward": "Triton; zeros of RELU rows skipped",
            "linear": "Triton",
            "decoding": f"{replayed}, batches of {', '.join(map(str, self._graphs.sizes))}",
        }


def _scratch(config: DecoderConfig, weights: DecoderWeights) -> int:
    """Bytes of workspace that any product of the model needs."""
    dtype, device = weights.lm_head.dtype, weights.lm_head.device
    qkv = config.q_size + 2 * config.kv_size
    products = ((qkv, config.hidden_size), (config.hidden_size, config.q_size), (config.vocab_size, config.hidden_size))
    linears = [scratch_bytes(width, size, dtype, device, Layout.OUT_IN) for width, size in products]
    return max(*linears, feed_forward_bytes(weights.stacked.gate[0]))
