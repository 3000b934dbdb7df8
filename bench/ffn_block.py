"""A gated feed-forward block alone: weights in many copies, rows with the zeros that are asked for, and both sides.

Copies of the weights are visited in turn, as a step visits its layers, so that weights come from memory: together they
are larger than a cache. All copies have the same values; rows are others for each copy.
"""

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import numba
import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from bench.bandwidth import arrays_of
from engine.activation import ALWAYS_SILU, MODE_CODE, NEVER_SILU, ActivationMode
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
from engine.kernels.cpu.isa import has_amx
from engine.kernels.cpu.layers import StepRows, of_layer
from engine.kernels.cpu.options import OPTIONS
from engine.kernels.cpu.scratch import make_scratch
from engine.models.config import DecoderConfig

Array = NDArray[Any]

MEMORY_BYTES = 600_000_000  # of weights that are visited before one comes again
PAUSE_SECONDS = 0.005  # in which threads of the side before stop waiting for work
# The first inputs of a row are its constant part, which the gate weighs the same for all neurons: 64 are a group of
# int8 weights, and this weight is one that int8 holds exactly (127 times a power of two).
CONSTANT = 64
GATE_CONSTANT = 127 / 1024


@dataclass(frozen=True, slots=True)
class Shape:
    """Widths of a block, multiples of 64."""

    hidden: int
    intermediate: int

    @property
    def weights(self) -> int:
        """Of gate, up and down."""
        return 3 * self.hidden * self.intermediate

    def __str__(self) -> str:
        return f"{self.hidden}x{self.intermediate}"


@dataclass(frozen=True, slots=True)
class Weights:
    """One copy in bfloat16.

    Attributes:
        gate: [intermediate, hidden].
        up: [intermediate, hidden].
        down: [intermediate, hidden], as the engine keeps it.
    """

    gate: Tensor
    up: Tensor
    down: Tensor

    @classmethod
    def random(cls, shape: Shape) -> "Weights":
        """The same weights each time, of a size that keeps outputs near 1."""
        generator = torch.Generator().manual_seed(shape.hidden)

        def normal(scale: float) -> Tensor:
            values = torch.randn(shape.intermediate, shape.hidden, generator=generator)
            return values.mul_(scale).bfloat16()

        gate = normal((shape.hidden - CONSTANT) ** -0.5)
        gate[:, :CONSTANT] = GATE_CONSTANT
        return cls(gate, normal(shape.hidden**-0.5), normal(shape.intermediate**-0.5))


def copies_for(shape: Shape, kind: Format) -> int:
    """How many copies are larger than a cache."""
    size = shape.weights * (2 if kind is Format.FLOAT else 1)
    return -(-MEMORY_BYTES // size)


class Rows:
    """Token rows for each copy, before the constant part that gives them their zeros.

    Args:
        weights: The block's.
        rows: Token rows at once.
        copies: How many batches.
        correlation: Between the values of two rows of a batch, in [0, 1]; 0 for independent rows.
    """

    def __init__(self, weights: Weights, rows: int, copies: int, correlation: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(rows)
        hidden = weights.gate.shape[1]
        noise = torch.randn(copies, rows, hidden, generator=generator)
        if correlation:
            common = torch.randn(copies, 1, hidden, generator=generator)
            noise = correlation**0.5 * common + (1 - correlation) ** 0.5 * noise
        noise = noise.bfloat16().float()
        noise[:, :, :CONSTANT] = 0
        self._noise = noise
        self._gates = noise @ weights.gate.float().t()
        self._sorted = self._gates.sort(-1).values

    def with_zeros(self, zeros: float) -> Tensor:
        """float32 [copies, rows, hidden], values of bfloat16: act(gate) of each row has this share of zeros.

        Args:
            zeros: In [0, 1], rounded to whole neurons.
        """
        threshold = self._threshold(zeros)
        x = self._noise.clone()
        each = (-threshold / (CONSTANT * GATE_CONSTANT)).bfloat16().float()
        # bfloat16 has 8 bits, too few to part one neuron from the next: the last constant is what the others leave.
        x[:, :, :CONSTANT] = each
        x[:, :, CONSTANT - 1 : CONSTANT] = (-threshold / GATE_CONSTANT - (CONSTANT - 1) * each).bfloat16().float()
        return x

    def idle(self, zeros: float) -> float:
        """Share of neurons that no row of a batch uses, the mean over the copies."""
        return (self._gates < self._threshold(zeros)).all(1).float().mean().item()

    def _threshold(self, zeros: float) -> Tensor:
        """[copies, rows, 1], half-way between the last gate value that becomes 0 and the first that does not."""
        ordered, size = self._sorted, self._sorted.shape[-1]
        count = round(zeros * size)
        below = ordered[:, :, count - 1] if count else ordered[:, :, 0] - 1
        above = ordered[:, :, count] if count < size else ordered[:, :, -1] + 1
        return ((below + above) / 2)[:, :, None]


class TorchBlock:
    """The block as users of PyTorch have it: three bfloat16 layers, `down` as [hidden, intermediate].

    Args:
        weights: The values of all copies.
        copies: How many.
    """

    def __init__(self, weights: Weights, copies: int) -> None:
        self.gate, self.up, self.down = (
            weight.expand(copies, -1, -1).contiguous() for weight in (weights.gate, weights.up, weights.down.t())
        )

    @torch.inference_mode()
    def sweep(self, x: Tensor) -> Tensor:
        """Every copy with its own rows, bfloat16 [copies, rows, hidden], to the last one's output."""
        for own, gate, up, down in zip(x, self.gate, self.up, self.down, strict=False):
            out = functional.linear(functional.silu(functional.linear(own, gate)) * functional.linear(own, up), down)
        return out

    def seconds(self, x: Tensor) -> float:
        """Of one copy, the mean of a sweep."""
        time.sleep(PAUSE_SECONDS)
        self.sweep(x[:1])
        start = time.perf_counter()
        self.sweep(x)
        return (time.perf_counter() - start) / len(x)


def _sweep(  # type: ignore[no-untyped-def]
    x, norm, inputs, config, down_config, skip, gate, up, down, step, scratch, out, zeros
):
    """Every copy with its own rows, as in a step without Python between them; added to the batches of `out` in turn."""
    for copy in range(x.shape[0]):
        feed_forward(
            FeedForward(
                x=x[copy],
                norm=norm,
                eps=np.float32(0),
                inputs=inputs,
                config=config,
                down_config=down_config,
                skip=skip,
                gate=of_layer(gate, copy),
                up=of_layer(up, copy),
                down=of_layer(down, copy),
                step=step,
                layer=copy,
                identity=False,
                scratch=scratch,
                out=out[copy % out.shape[0]],
            )
        )
        for part in range(scratch.zeros.shape[0]):
            for r in range(x.shape[1]):
                zeros[r] += scratch.zeros[part, r]


# Not cached: the cache would not see that a kernel below was changed.
_compiled_sweep = njit(**{**OPTIONS, "cache": False})(_sweep)


class OurBlock:
    """The block in the engine's own kernels.

    Args:
        weights: The values of all copies.
        kind: What they are stored as.
        copies: How many.
        rows: Most token rows at once.
        amx: Whether to use AMX tiles; None if the processor has them.
    """

    def __init__(self, weights: Weights, kind: Format, copies: int, rows: int, *, amx: bool | None = None) -> None:
        intermediate, hidden = weights.gate.shape
        self._shape = Shape(hidden, intermediate)
        self._kind = kind
        self._amx = has_amx() if amx is None else amx
        self._copies = copies
        stored = (store(weight[None], kind, amx=self._amx) for weight in (weights.gate, weights.up))
        self._gate, self._up = (_copied(weight, copies) for weight in stored)
        self._down = _copied(store_down(weights.down[None], kind), copies)
        make = partial(make_hidden, self._kind.of_down, amx=self._amx)
        self._scratch = make_scratch(_decoder(self._shape), rows, numba.get_num_threads(), make)
        self._inputs = make_rows(kind, rows, hidden, amx=self._amx)
        self._none = np.empty(0, np.float32)

    @property
    def arrays(self) -> list[Array]:
        """All copies of the weights."""
        return list(arrays_of((self._gate, self._up, self._down)))

    def bytes_read(self, idle: float) -> float:
        """Of one copy's weights if this share of neurons is used by no row: `gate` in full, the rest for the others."""
        gate, rest = (sum(array.nbytes for array in arrays_of(part)) for part in (self._gate, (self._up, self._down)))
        return (gate + (1 - idle) * rest) / self._copies

    def sweep(self, x: Tensor, *, sparse: bool, relu: bool = True) -> tuple[Tensor, float]:
        """Every copy with its own rows.

        Args:
            x: float32 [copies, rows, hidden]; fewer copies will do.
            sparse: Whether `up` and `down` are read for active neurons only.
            relu: RELU rows, else SILU.

        Returns:
            float32 [copies, rows, hidden], and the share of act(gate) that was 0, in [0, 1].
        """
        copies, rows, _ = x.shape
        out, zeros = torch.zeros_like(x), np.zeros(rows, np.int64)
        self._call(x.numpy(), self._step(rows, relu), sparse, out.numpy(), zeros)
        return out, float(zeros.sum()) / (copies * rows * self._shape.intermediate)

    def seconds(self, x: Tensor, *, sparse: bool, relu: bool = True) -> float:
        """Of one copy, the mean of a sweep."""
        copies, rows, _ = x.shape
        values, out, zeros = x.numpy(), np.zeros((1, *x.shape[1:]), np.float32), np.zeros(rows, np.int64)
        step = self._step(rows, relu)
        time.sleep(PAUSE_SECONDS)
        self._call(values[:1], step, sparse, out, zeros)
        start = time.perf_counter()
        self._call(values, step, sparse, out, zeros)
        return (time.perf_counter() - start) / copies

    def _call(self, x: Array, step: StepRows, skip: bool, out: Array, zeros: Array) -> None:
        rows = x.shape[1]
        _compiled_sweep(
            x,
            self._none,
            self._inputs,
            tiles_for(self._kind, rows, amx=self._amx),
            down_tiles_for(self._kind.of_down, rows, amx=self._amx),
            skip,
            self._gate,
            self._up,
            self._down,
            step,
            self._scratch,
            out,
            zeros,
        )

    @staticmethod
    def _step(rows: int, relu: bool) -> StepRows:
        """Attention's part is empty: nobody reads it."""
        integers, angles = np.zeros(rows, np.int64), np.zeros((rows, 1), np.float32)
        return StepRows(
            cos=angles,
            sin=angles,
            tokens=integers,
            slots=integers,
            sequence=np.zeros(rows, np.int32),
            tables=np.zeros((1, 1), np.int32),
            positions=integers,
            thresholds=np.full(rows, NEVER_SILU if relu else ALWAYS_SILU, np.int64),
            keys=np.zeros((rows, 2), np.int64),
            modes=np.full(rows, MODE_CODE[ActivationMode.RELU if relu else ActivationMode.SILU]),
        )


def _copied(stored: Any, copies: int) -> Any:
    """One stored weight [1, ...] many times over, each in memory of its own."""
    if isinstance(stored, tuple):
        return type(stored)(*(np.repeat(part, copies, axis=0) for part in stored))
    # The engine's bfloat16 weights lie in PyTorch's memory, and NumPy would ask for larger pages.
    return as_array(torch.from_numpy(stored).expand(copies, -1).contiguous())


def _decoder(shape: Shape) -> DecoderConfig:
    """A decoder with such a block; its attention is small, because scratch memory has room for it."""
    return DecoderConfig(
        architecture="LlamaForCausalLM",
        vocab_size=64,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=16,
        norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=None,
        max_position=64,
        tie_embeddings=True,
        sliding_window=(None,),
        use_rope=(True,),
    )
