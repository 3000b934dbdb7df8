"""Matrix products whose rows do not depend on each other, not even in the last bit.

A BLAS library chooses its kernel, and so the order of its sums, by the number of rows: the same token computed alone
and in a batch of 32 differs in its last bits, and sooner or later in its text. With a fixed number of rows the order is
fixed. So at load each weight is tried at a ladder of row counts; those that give bit-identical rows form a class, and
from then on only row counts of one class are used, with padding up to the next one. Usually a class spans most of the
ladder and padding costs little.
"""

from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

LADDER = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
WEIGHT_READ_ROWS = 16


class InvariantLinear:
    """y = x W^T + b for one weight, each row bit-identical whatever the other rows are.

    Args:
        weight: [out, in], or [in, out] with `transposed`.
        bias: [out] or None.
        transposed: Layout of `weight`; feed-forward `down` is stored transposed.
        sizes: Row counts to use, from `invariant_sizes`; None multiplies any number of rows as it comes (fast, not
            invariant).
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        transposed: bool = False,
        sizes: tuple[int, ...] | None = None,
    ) -> None:
        self.weight = weight if transposed else weight.t()
        self.bias = bias
        self.sizes = sizes

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply [rows, in] to [rows, out]."""
        y = self._multiply(x) if self.sizes is None else self._in_sizes(x, self.sizes)
        return y if self.bias is None else y + self.bias

    def _multiply(self, x: Tensor) -> Tensor:
        return torch.mm(x, self.weight)

    def _in_sizes(self, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        rows = x.shape[0]
        tiles = tile_rows(rows, sizes)
        if len(tiles) > 1:
            parts = x.split([*tiles[:-1], rows - sum(tiles[:-1])])
            return torch.cat([self._in_sizes(part, sizes) for part in parts])
        padding = tiles[0] - rows
        return self._multiply(functional.pad(x, (0, 0, 0, padding)))[:rows] if padding else self._multiply(x)


@lru_cache(maxsize=4096)
def tile_rows(rows: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Cut `rows` >= 1 into tiles of the given sizes at the least cost; only the last one may be padded.

    A product costs about as much as reading its weight, which many processors do in the time of 16 rows of arithmetic,
    plus its rows.
    """
    largest = sizes[-1]
    if rows > 2 * largest:
        whole = rows // largest - 1
        return (largest,) * whole + tile_rows(rows - whole * largest, sizes)
    cuts = [(size, *tile_rows(rows - size, sizes)) for size in sizes if size < rows and 4 * size > min(rows, largest)]
    fitting = [(size,) for size in sizes if size >= rows][:1]
    return min([*cuts, *fitting], key=_cost)


def _cost(tiles: tuple[int, ...]) -> int:
    return sum(WEIGHT_READ_ROWS + size for size in tiles)


def invariant_sizes(
    out_features: int, in_features: int, dtype: torch.dtype, *, transposed: bool = False, max_rows: int = LADDER[-1]
) -> tuple[int, ...]:
    """Row counts at which products of this shape, type and layout give bit-identical rows.

    Tried on operands whose products cancel in pairs at random places. What is left of such a sum is its rounding errors
    alone, so another order of summation shows in nearly every element, even after rounding to bfloat16.

    Args:
        out_features: Of the weight.
        in_features: Of the weight.
        dtype: Of weight and input.
        transposed: Layout of the weight, as in `InvariantLinear`.
        max_rows: Row counts beyond this are not tried.

    Returns:
        Row counts in rising order. The choice depends on arithmetic and the number of threads only, never on timing, so
        that it is the same at each start on the same machine.
    """
    return _invariant_sizes(out_features, in_features, dtype, transposed, max_rows, torch.get_num_threads())


@lru_cache(maxsize=256)
def _invariant_sizes(
    out_features: int, in_features: int, dtype: torch.dtype, transposed: bool, max_rows: int, threads: int
) -> tuple[int, ...]:
    ladder = [size for size in LADDER if size <= max_rows]
    x, weight = _cancelling_operands(ladder[-1], out_features, in_features, dtype)
    linear = InvariantLinear(weight.t().contiguous() if transposed else weight, transposed=transposed)
    results: dict[int, Tensor] = {}
    for size in ladder:
        y = linear(x[:size])
        # A row must not depend on its place either.
        if torch.equal(linear(x[:size].roll(1, 0)), y.roll(1, 0)):
            results[size] = y
    classes: list[list[int]] = []
    for size, y in results.items():
        for members in classes:
            if torch.equal(results[members[-1]], y[: members[-1]]):
                members.append(size)
                break
        else:
            classes.append([size])
    # A single row at a time is invariant on any library.
    return tuple(min(classes, key=_padding_cost, default=[1]))


def _cancelling_operands(rows: int, out_features: int, in_features: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    half = in_features // 2
    shuffled = torch.randperm(in_features, generator=generator)

    def paired(count: int, sign: int) -> Tensor:
        values = torch.zeros(count, in_features)
        values[:, :half] = torch.randn(count, half, generator=generator)
        values[:, half : 2 * half] = sign * values[:, :half]
        return values[:, shuffled].to(dtype)

    weight = torch.empty(out_features, in_features, dtype=dtype)
    for part in weight.split(4096):  # a vocabulary in float32 would be a lot of memory
        part.copy_(paired(len(part), 1))
    return paired(rows, -1), weight


def _padding_cost(sizes: Iterable[int]) -> float:
    """How much more work batches of typical sizes are when only these row counts may be used.

    From constants, not from measurements: the choice must come out the same at each start.
    """
    return sum(_cost(tile_rows(rows, tuple(sizes))) / _cost((rows,)) for rows in (1, 4, 16, 32, 64, 128, 256))
