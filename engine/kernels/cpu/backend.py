"""The CPU backend: a whole step in compiled code, products by AMX tiles where the processor has them."""

import math
from functools import partial
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.activation import PositiveBranch
from engine.config import Quantization
from engine.errors import UnsupportedArchitecture
from engine.ffn_router import FfnCosts
from engine.ffn_work import WeightSizes
from engine.kernels.backend import Backend
from engine.kernels.cpu.angles import AngleTable
from engine.kernels.cpu.attention_tiles import STEP, attention_tiles
from engine.kernels.cpu.cost_cache import cached_costs
from engine.kernels.cpu.costs import measure_ffn_costs
from engine.kernels.cpu.feed_forward import FeedForward, feed_forward
from engine.kernels.cpu.formats import (
    Format,
    as_array,
    down_tiles_for,
    make_hidden,
    make_rows,
    store,
    store_down,
    tiles_for,
)
from engine.kernels.cpu.isa import has_amx, vector_set
from engine.kernels.cpu.layers import LayerArrays, Layers, StepRows, of_layer, project, run_layers
from engine.kernels.cpu.pinning import pin_compute_threads
from engine.kernels.cpu.product import BLOCK
from engine.kernels.cpu.quantised import INT8_GROUP
from engine.kernels.cpu.scratch import Scratch, make_scratch
from engine.kernels.cpu.tiles import ROWS
from engine.kv_cache import KVCache
from engine.models.config import DecoderConfig, DecoderWeights
from engine.step import StepInputs

Array = NDArray[Any]

_FORMATS = {Quantization.NONE: Format.FLOAT, Quantization.INT8: Format.INT8, Quantization.INT4: Format.INT4}


class _Room(NamedTuple):
    """What `run_layers` works in and fills, for one number of rows."""

    hidden: Tensor  # float32 [rows, hidden]
    array: Array  # the same memory
    scratch: Scratch
    tiles: Any
    down_tiles: Any
    zeros: Array  # int64 [layers, rows]
    kept: Array  # int64 [layers, rows]
    totals: Array  # int64 [1 + rows]


class CpuBackend(Backend):
    """See the modules beside this one for the kernels.

    Args:
        quantization: Bits of the weights. Their tensors are let go of; what stays is the embedding.
        amx: Use AMX tiles; None if the processor has them. Weights of float32 never do.

    Raises:
        UnsupportedArchitecture: A width is no multiple of what the kernels need.
    """

    def __init__(
        self,
        config: DecoderConfig,
        weights: DecoderWeights,
        cache: KVCache,
        *,
        quantization: Quantization = Quantization.NONE,
        amx: bool | None = None,
    ) -> None:
        super().__init__(config, weights, cache)
        _check_widths(config, quantization)
        quantised = quantization is not Quantization.NONE
        self._amx = (quantised or weights.embedding.dtype is torch.bfloat16) and (has_amx() if amx is None else amx)
        self._threads = numba.get_num_threads()
        self._kind = _FORMATS[quantization]
        # A vocabulary that is no multiple of 16 keeps its output matrix.
        self._head_kind = Format.INT8 if quantised and config.vocab_size % 16 == 0 else Format.FLOAT
        self._head_amx = self._amx and (self._head_kind is not Format.FLOAT or weights.lm_head.dtype is torch.bfloat16)
        self._arrays = _layer_arrays(config, weights, self._kind, amx=self._amx)
        self._head = of_layer(store(weights.lm_head[None], self._head_kind, amx=self._head_amx), 0)
        self._final_norm = weights.final_norm.float().numpy()
        self._angles = AngleTable(weights.rope_inv_freq)
        self._none = np.empty(0, np.float32)
        self._keys, self._values = as_array(cache.keys), as_array(cache.values)
        self._eps, self._scale = np.float32(config.norm_eps), np.float32(1 / math.sqrt(config.head_dim))
        tiled = self._amx and cache.keys.dtype is torch.bfloat16 and config.head_dim % STEP == 0
        self._attention_tiles = attention_tiles() if tiled else None
        self._embedding = as_array(weights.embedding)
        self._capacity = 0
        self._room: _Room | None = None
        self._logits = self._all_logits = torch.empty(0, config.vocab_size)
        self._step: tuple[StepInputs, StepRows] | None = None

    def forward(self, step: StepInputs) -> Tensor:
        """See `Backend.forward`."""
        rows = self._step_rows(step)
        count = len(rows.modes)
        self._reserve(count)
        room = self._room_for(count)
        run_layers(
            Layers(
                x=room.array,
                embedding=self._embedding,
                weights=self._arrays,
                step=rows,
                skip=step.skip_zeros,
                keys=self._keys,
                values=self._values,
                eps=self._eps,
                scale=self._scale,
                identity=step.activations.positive_branch is PositiveBranch.IDENTITY,
                inputs=self._hidden_rows,
                inputs_o=self._attended_rows,
                config=room.tiles,
                down_config=room.down_tiles,
                attention_config=self._attention_tiles,
                scratch=room.scratch,
                zeros=room.zeros,
                kept=room.kept,
                totals=room.totals,
            )
        )
        self.sparsity.add(rows.modes, room.zeros, self.config.intermediate_size)
        self.draws.add(rows.modes, rows.thresholds, room.zeros, room.kept)
        self.neurons_read, self.row_zeros = int(room.totals[0]), room.totals[1:]
        return room.hidden

    @property
    def weight_bytes(self) -> int:
        """See `Backend.weight_bytes`: the tensors that are left, and what quantisation made of the others."""
        quantised = [part for part in (*self._arrays, self._head) if isinstance(part, tuple)]
        return super().weight_bytes + sum(array.nbytes for part in quantised for array in part)

    @property
    def weight_sizes(self) -> WeightSizes:
        """See `Backend.weight_sizes`."""
        layers = self.config.num_layers
        neurons = layers * self.config.intermediate_size
        return WeightSizes(
            layers=sum(_bytes_of(part) for part in self._arrays[:-2]),  # all but what is no weight
            neuron=(_bytes_of(self._arrays.up) + _bytes_of(self._arrays.down)) // neurons,
            head=_bytes_of(self._head) + self.weights.final_norm.nbytes,
            embedding_row=self.weights.embedding[0].nbytes,
        )

    def store_gate(self, gate: Tensor) -> Any:
        """A gate [intermediate, hidden] for `feed_forward`, in the format of the model's own."""
        return of_layer(store(gate[None].to(self.weights.embedding.dtype), self._kind, amx=self._amx), 0)

    def feed_forward(self, layer: int, x: Tensor, step: StepInputs, gate: Any = None) -> Tensor:
        """One layer's feed-forward alone, for measurements: float32 [rows, hidden], normalised, to the same.

        Args:
            layer: Whose weights.
            x: The rows.
            step: Their activations; whether zeros are skipped.
            gate: One from `store_gate`, in place of the layer's.
        """
        count = len(x)
        self._reserve(count)
        arrays, out = self._arrays, torch.zeros_like(x)
        feed_forward(
            FeedForward(
                x=x.numpy(),
                norm=self._none,
                eps=self._eps,
                inputs=self._hidden_rows,
                config=tiles_for(self._kind, count, amx=self._amx),
                down_config=down_tiles_for(self._kind.of_down, count, amx=self._amx),
                skip=step.skip_zeros,
                gate=of_layer(arrays.gate, layer) if gate is None else gate,
                up=of_layer(arrays.up, layer),
                down=of_layer(arrays.down, layer),
                step=self._step_rows(step),
                layer=layer,
                identity=step.activations.positive_branch is PositiveBranch.IDENTITY,
                scratch=self._scratch,
                out=out.numpy(),
            )
        )
        return out

    def pin_threads(self) -> bool:
        """See `Backend.pin_threads`."""
        return pin_compute_threads()

    def measure_ffn_costs(self) -> FfnCosts:
        """See `Backend.measure_ffn_costs`; measured once on this machine, then read from disk."""
        config = self.config
        sizes = config.hidden_size, config.intermediate_size, config.num_layers
        subject = f"{sizes} {self._kind.name} amx={self._amx} threads={self._threads} {self.weights.embedding.dtype}"
        return cached_costs(subject, lambda: measure_ffn_costs(self))

    def _step_rows(self, step: StepInputs) -> StepRows:
        cos, sin = self._angles.at(step.positions.numpy())
        if self._step is not None and self._step[0] is step:  # its memory is the same as well
            return self._step[1]._replace(cos=cos, sin=sin)
        activations = step.activations
        rows = StepRows(
            cos=cos,
            sin=sin,
            tokens=step.token_ids.numpy(),
            slots=step.slots.numpy(),
            sequence=step.row_sequence.numpy(),
            tables=step.block_tables.numpy(),
            positions=step.positions.numpy(),
            thresholds=activations.threshold.numpy(),
            keys=activations.keys.numpy(),
            modes=activations.mode.numpy(),
        )
        self._step = step, rows
        return rows

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Backend.logits`."""
        count = len(hidden)
        if count != len(self._logits):
            if count > len(self._all_logits):
                self._all_logits = torch.empty(count, self.config.vocab_size)
            self._logits = self._all_logits[:count]
        out = self._logits
        if count == 0:  # a step of unfinished prompts
            return out
        self._reserve(count)
        config = tiles_for(self._head_kind, count, amx=self._head_amx)
        project(
            hidden.numpy(),
            self._final_norm,
            self._eps,
            self._head_rows,
            self._head,
            config,
            out.numpy(),
            self._scratch,
        )
        return out

    def _reserve(self, rows: int) -> None:
        """Have memory for so many rows; it grows in powers of two."""
        if rows <= self._capacity:
            return
        self._capacity = rows = max(ROWS, 1 << (rows - 1).bit_length())
        hidden, q_size = self.config.hidden_size, self.config.q_size
        make = partial(make_hidden, self._kind.of_down, amx=self._amx)
        self._scratch = make_scratch(self.config, rows, self._threads, make)
        self._hidden_rows = make_rows(self._kind, rows, hidden, amx=self._amx)
        self._attended_rows = make_rows(self._kind, rows, q_size, amx=self._amx)
        self._head_rows = make_rows(self._head_kind, rows, hidden, amx=self._head_amx)
        self._hidden = torch.empty(rows, hidden)
        self._room = None

    def _room_for(self, rows: int) -> "_Room":
        """The memory of a step of so many rows, kept for the steps that follow: most have as many."""
        room = self._room
        if room is None or len(room.array) != rows:
            hidden, scratch, layers = self._hidden[:rows], self._scratch, self.config.num_layers
            room = self._room = _Room(
                hidden=hidden,
                array=hidden.numpy(),
                scratch=scratch._replace(
                    qkv=scratch.qkv[:rows],
                    queries=scratch.queries[:rows],
                    attended=scratch.attended[:rows],
                ),
                tiles=tiles_for(self._kind, rows, amx=self._amx),
                down_tiles=down_tiles_for(self._kind.of_down, rows, amx=self._amx),
                zeros=np.empty((layers, rows), np.int64),
                kept=np.empty((layers, rows), np.int64),
                totals=np.empty(1 + rows, np.int64),
            )
        return room

    def describe(self) -> dict[str, str]:
        """See `Backend.describe`."""
        vectors = f"vector loops ({vector_set()})"
        products = "AMX tiles" if self._amx else vectors
        return {
            "attention": "paged, " + (vectors if self._attention_tiles is None else "AMX tiles"),
            "feed-forward": f"{products}; zeros of RELU rows skipped",
            "linear": products,
        }


def _bytes_of(part: Any) -> int:
    """Memory of a weight in any format."""
    return sum(array.nbytes for array in part) if isinstance(part, tuple) else int(part.nbytes)


def _check_widths(config: DecoderConfig, quantization: Quantization) -> None:
    width = BLOCK if quantization is Quantization.NONE else INT8_GROUP
    needed = {"hidden_size": width, "intermediate_size": width, "q_size": width, "head_dim": 16}
    if quantization is not Quantization.NONE:
        needed["kv_size"] = 16
    if config.vocab_size < BLOCK:
        raise UnsupportedArchitecture(
            f"vocab_size {config.vocab_size} is below {BLOCK}, which the CPU kernels need; the reference kernels run it"
        )
    hint = "the reference kernels run it" if quantization is Quantization.NONE else "quantize 'none' may run it"
    for name, multiple in needed.items():
        if getattr(config, name) % multiple:
            kernels = "CPU kernels need" if quantization is Quantization.NONE else f"{quantization} weights need"
            raise UnsupportedArchitecture(
                f"{name} {getattr(config, name)} is no multiple of {multiple}, which the {kernels}; {hint}"
            )


def _layer_arrays(config: DecoderConfig, weights: DecoderWeights, kind: Format, *, amx: bool) -> LayerArrays:
    stacked = weights.stacked

    def linear(name: str) -> Any:
        weight = getattr(stacked, name)
        stored = store_down(weight, kind) if name == "down" else store(weight, kind, amx=amx)
        if kind is not Format.FLOAT:  # let go of each at once, so that memory never holds all of both
            setattr(stacked, name, weight.new_empty(config.num_layers, 0, weight.shape[-1]))
        return stored

    def small(vectors: Tensor | None) -> Array:
        return np.empty((config.num_layers, 0), np.float32) if vectors is None else vectors.float().numpy()

    return LayerArrays(
        input_norm=small(stacked.input_norm),
        qkv=linear("qkv"),
        qkv_bias=small(stacked.qkv_bias),
        q_norm=small(stacked.q_norm),
        k_norm=small(stacked.k_norm),
        o=linear("o"),
        o_bias=small(stacked.o_bias),
        post_norm=small(stacked.post_norm),
        gate=linear("gate"),
        up=linear("up"),
        down=linear("down"),
        window=np.array([window or 0 for window in config.sliding_window]),
        rotated=np.array(config.use_rope),
    )
