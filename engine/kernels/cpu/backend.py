"""The CPU backend: PyTorch's matrix products at fixed row counts, Numba for everything around them."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.activation import MODE_CODE, ActivationMode, PositiveBranch
from engine.errors import UnsupportedArchitecture
from engine.ffn_router import HIGH_ZEROS, LOW_ZEROS, MEASURED_ROWS, FfnCosts
from engine.kernels.backend import Backend, rotary_angles
from engine.kernels.cpu.activation import activate
from engine.kernels.cpu.attention import paged_attention, rotate_and_cache
from engine.kernels.cpu.linear import LADDER, InvariantLinear, invariant_sizes
from engine.kernels.cpu.norm import rms_norm
from engine.kernels.cpu.sparse_ffn import PARTS, sparse_ffn
from engine.kv_cache import KVCache
from engine.models.config import DecoderConfig, DecoderWeights, LayerWeights
from engine.step import StepInputs

Array = NDArray[Any]


def as_array(tensor: Tensor) -> Array:
    """A NumPy view of a tensor; bfloat16, which NumPy lacks, as its bits in uint16."""
    array: Array = (tensor.view(torch.uint16) if tensor.dtype is torch.bfloat16 else tensor).numpy()
    return array


def _in_columns(weight: Tensor) -> Tensor:
    """The same matrix, laid out in memory column by column."""
    return weight.t().contiguous().t()


class _Layer:
    """One layer's weights as the kernels want them; given weights in another layout are replaced."""

    def __init__(self, weights: LayerWeights, config: DecoderConfig, linear: Callable[..., InvariantLinear]) -> None:
        # Transposed weights keep more row counts in one class, see `invariant_sizes`; `up` and `down` must stay
        # neuron-major.
        transpose_gate = weights.gate.dtype is torch.float32
        weights.qkv, weights.o = _in_columns(weights.qkv), _in_columns(weights.o)
        self.qkv = linear(weights.qkv.t(), weights.qkv_bias, transposed=True)
        self.o = linear(weights.o.t(), weights.o_bias, transposed=True)
        if transpose_gate:
            weights.gate = _in_columns(weights.gate)
        self.gate = linear(weights.gate.t() if transpose_gate else weights.gate, transposed=transpose_gate)
        self.up = linear(weights.up)
        self.down = linear(weights.down, transposed=True)
        self.up_array, self.down_array = as_array(weights.up), as_array(weights.down)
        none = np.empty(0, np.float32)
        self.q_norm = none if weights.q_norm is None else weights.q_norm.float().numpy()
        self.k_norm = none if weights.k_norm is None else weights.k_norm.float().numpy()


class CpuBackend(Backend):
    """See the modules beside this one for the kernels.

    Args:
        deterministic: Multiply at fixed row counts, so that no row depends on its batch-mates.

    Raises:
        UnsupportedArchitecture: A width is no multiple of 16.
    """

    has_sparse_ffn = True

    def __init__(
        self,
        config: DecoderConfig,
        weights: DecoderWeights,
        cache: KVCache,
        *,
        deterministic: bool = True,
    ) -> None:
        super().__init__(config, weights, cache)
        for name in ("hidden_size", "head_dim"):
            if getattr(config, name) % 16:
                raise UnsupportedArchitecture(
                    f"{name} {getattr(config, name)} is no multiple of 16, which the CPU kernels need; "
                    "the reference backend runs it"
                )

        def linear(
            weight: Tensor, bias: Tensor | None = None, *, transposed: bool = False, max_rows: int = LADDER[-1]
        ) -> InvariantLinear:
            if not deterministic:
                return InvariantLinear(weight, bias, transposed=transposed)
            out_features, in_features = weight.shape[::-1] if transposed else weight.shape
            sizes = invariant_sizes(out_features, in_features, weight.dtype, transposed=transposed, max_rows=max_rows)
            return InvariantLinear(weight, bias, transposed=transposed, sizes=sizes)

        self._layers = [_Layer(layer, config, linear) for layer in weights.layers]
        self._head = linear(weights.lm_head, max_rows=64)  # sees sampled rows only
        self._keys, self._values = as_array(cache.keys), as_array(cache.values)
        self._eps, self._scale = np.float32(config.norm_eps), np.float32(1 / math.sqrt(config.head_dim))

    def begin(self, step: StepInputs) -> None:
        """Views of the step's tensors, shared by all layers."""
        cos, sin = rotary_angles(step.positions, self.weights.rope_inv_freq)
        self._cos, self._sin = cos.numpy(), sin.numpy()
        self._slots, self._positions = step.slots.numpy(), step.positions.numpy()
        self._tables, self._row_sequence = step.block_tables.numpy(), step.row_sequence.numpy()
        rows = step.activations
        self._modes, self._thresholds, self._keys_philox = rows.mode.numpy(), rows.threshold.numpy(), rows.keys.numpy()
        self._is_silu = self._modes == MODE_CODE[ActivationMode.SILU]
        self._identity = rows.positive_branch is PositiveBranch.IDENTITY
        self._queries = np.empty((len(self._slots), self.config.num_heads, self.config.head_dim), np.float32)
        self._zeros = np.empty(len(self._slots), np.int64)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """See `Backend.norm`."""
        out = torch.empty(x.shape, dtype=weight.dtype)
        rms_norm(x.numpy(), as_array(weight), self._eps, as_array(out))
        return out

    def attention(self, layer: int, x: Tensor, step: StepInputs) -> Tensor:
        """See `Backend.attention`."""
        weights = self._layers[layer]
        rotated = self.config.use_rope[layer]
        keys, values = self._keys[layer], self._values[layer]
        rotate_and_cache(
            as_array(weights.qkv(x)),
            self._cos if rotated else self._cos[:, :0],
            self._sin if rotated else self._sin[:, :0],
            weights.q_norm,
            weights.k_norm,
            self._eps,
            self._scale,
            self._slots,
            self._queries,
            keys,
            values,
        )
        out = torch.empty(x.shape[0], self.config.q_size, dtype=x.dtype)
        window = self.config.sliding_window[layer] or 0
        paged_attention(
            self._queries, keys, values, self._tables, self._row_sequence, self._positions, window, as_array(out)
        )
        return weights.o(out)

    def feed_forward(self, layer: int, x: Tensor, step: StepInputs) -> Tensor:
        """See `Backend.feed_forward`."""
        weights = self._layers[layer]
        gate = weights.gate(x)
        sparse, rows = step.sparse_rows, x.shape[0]
        if sparse == 0:
            out = self._dense(layer, gate, x, 0)
        elif sparse == rows:
            out = self._sparse(layer, gate, x)
        else:
            out = torch.cat(
                (self._sparse(layer, gate[:sparse], x[:sparse]), self._dense(layer, gate[sparse:], x[sparse:], sparse))
            )
        self.sparsity.add(layer, self._modes, self._zeros, gate.shape[1])
        return out

    def _activate(self, layer: int, gate: Tensor, up: Tensor, out: Tensor, first: int) -> None:
        """out = act(gate) * up for the step's rows from `first` on."""
        rows = slice(first, first + gate.shape[0])
        activate(
            as_array(gate),
            self._thresholds[rows],
            self._keys_philox[rows],
            self._positions[rows],
            self._is_silu[rows],
            layer,
            self._identity,
            as_array(up),
            as_array(out),
            self._zeros[rows],
        )

    def _dense(self, layer: int, gate: Tensor, x: Tensor, first: int) -> Tensor:
        weights = self._layers[layer]
        activated = torch.empty_like(gate)
        self._activate(layer, gate, weights.up(x), activated, first)
        return weights.down(activated)

    def _sparse(self, layer: int, gate: Tensor, x: Tensor) -> Tensor:
        activated = torch.empty(gate.shape)
        self._activate(layer, gate, gate[:, :0], activated, 0)
        return self._skip_zeros(layer, activated, x)

    def _skip_zeros(self, layer: int, activated: Tensor, x: Tensor) -> Tensor:
        weights, out = self._layers[layer], torch.empty_like(x)
        partial = np.empty((PARTS, *x.shape), np.float32)
        sparse_ffn(x.float().numpy(), activated.numpy(), weights.up_array, weights.down_array, partial, as_array(out))
        return out

    def logits(self, x: Tensor) -> Tensor:
        """See `Backend.logits`."""
        if x.shape[0] == 0:  # a step of unfinished prompts
            return x.new_empty(0, self.config.vocab_size)
        return self._head(x)

    def measure_ffn_costs(self) -> FfnCosts:
        """See `Backend.measure_ffn_costs`. Goes round all layers, so that weights come from memory as in real steps."""
        generator = torch.Generator().manual_seed(0)
        dtype = self.weights.embedding.dtype

        def median_seconds(run: Callable[[int], object]) -> float:
            run(0)
            seconds = []
            for turn in range(9):
                start = time.perf_counter()
                run(turn % len(self._layers))
                seconds.append(time.perf_counter() - start)
            return statistics.median(seconds)

        dense: list[float] = []
        low: list[float] = []
        high: list[float] = []
        for rows in MEASURED_ROWS:
            x = torch.randn(rows, self.config.hidden_size, generator=generator).to(dtype)
            drawn = torch.rand(rows, self.config.intermediate_size, generator=generator)
            activated = {zeros: torch.where(drawn < zeros, 0.0, drawn) for zeros in (LOW_ZEROS, HIGH_ZEROS)}
            narrow = activated[LOW_ZEROS].to(dtype)

            def run_dense(layer: int, x: Tensor = x, h: Tensor = narrow) -> object:
                return self._layers[layer].up(x), self._layers[layer].down(h)

            dense.append(median_seconds(run_dense))
            for zeros, costs in ((LOW_ZEROS, low), (HIGH_ZEROS, high)):

                def run_sparse(layer: int, x: Tensor = x, h: Tensor = activated[zeros]) -> object:
                    return self._skip_zeros(layer, h, x)

                costs.append(median_seconds(run_sparse))
        return FfnCosts(tuple(dense), tuple(low), tuple(high))

    def describe(self) -> dict[str, str]:
        """See `Backend.describe`."""
        first = self._layers[0]
        sizes = "any" if first.up.sizes is None else "/".join(map(str, first.up.sizes))
        return {
            "attention": "Numba, paged, one row at a time",
            "feed-forward": "Numba activation; sparse up/down in Numba, dense in PyTorch",
            "linear": f"PyTorch, {sizes} rows at once",
        }
