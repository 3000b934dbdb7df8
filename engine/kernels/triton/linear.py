"""Products by weights [out, in] that give a row the same bits in any batch.

Every product is a tile of `ROW_TILE` rows by `block_n` outputs, whatever the number of rows, so that one matrix
instruction computes all of them. The inputs are cut into splits, by the weight's shape alone; each split adds up its
own products in float32 from 0 on, `block_k` inputs at a time in rising order, and the splits' sums are then added in
order. There are two schedules of these additions:

- few rows (decoding): each split is a program of its own, so that the whole device reads weights; a second kernel adds
  the splits' sums up, or the kernel that reads the product next does it by the way (`split_sums`),
- many rows (prompts): a program goes through the splits one after another.

Both give the same bits. There are no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton.arithmetic import multiply_add
from engine.kernels.triton.overlap import OVERLAPPED, await_inputs
from engine.kernels.triton.tuning import ROW_TILE, Layout, Tile, tile_for
from engine.kernels.triton.workspace import Workspace, bytes_of

__all__ = ["Workspace", "linear", "scratch_bytes"]

DTYPES = (torch.bfloat16, torch.float32)
REDUCED_OUTPUTS = 256  # of one row, by one program of `_reduce_kernel`


@triton.jit
def split_sum(  # type: ignore[no-untyped-def]
    x, weight, row, row_mask, output, output_mask, start, stop, size, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr
):
    """Sum over inputs [start, stop) of x[row, input] * weight[output, input]; for kernels.

    An output's bits do not depend on its place in the tile, so `output` may be any list of the weight's rows.

    `stop - start` must not be a compile-time constant: of a loop that is known to run once, the compiler would make
    `total + a @ b` with the sum of the splits before, which is another order of additions.

    Args:
        x: Pointer to [rows, size].
        weight: Pointer to [outputs, size], same type.
        row: int64 [M], rows of x; those with a false `row_mask` count as zeros, and are not read.
        output: int64 [N], rows of the weight, likewise.
        start: First input.
        stop: One after the last.
        size: Inputs of a row.
        EVEN_K: `stop - start` is a multiple of BLOCK_K.

    Returns:
        float32 [M, N].
    """
    total = tl.zeros((row.shape[0], output.shape[0]), tl.float32)
    for first in range(start, stop, BLOCK_K):
        at = first + tl.arange(0, BLOCK_K)
        wanted, needed = row_mask[:, None], output_mask[:, None]
        if not EVEN_K:
            wanted = wanted & (at < stop)[None, :]
            needed = needed & (at < stop)[None, :]
        a = tl.load(x + row[:, None] * size + at[None, :], mask=wanted, other=0.0)
        b = tl.load(weight + output[:, None] * size + at[None, :], mask=needed, other=0.0)
        total = multiply_add(a, tl.trans(b), total)
    return total


@triton.jit
def finish(total, bias, out, row, column, mask, width, HAS_BIAS: tl.constexpr, ADD: tl.constexpr):  # type: ignore[no-untyped-def]
    """out[row, column] = total + bias, or += with ADD; for kernels. Additions only: nothing can be contracted."""
    if HAS_BIAS:
        total += tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
    place = out + row * width + column
    if ADD:
        total = tl.load(place, mask=mask, other=0.0) + total
    tl.store(place, total, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _product_kernel(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    out,
    rows,
    size,
    width,
    split_size,
    splits,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    WHOLE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADD: tl.constexpr,
):
    """Out = x @ weight.T, or the sum of one split of it.

    Program (i, s): tile i, row tiles first, so that those that read the same weights run at the same time. WHOLE: all
    splits in order, to `out` [rows, width] by `finish`; else split s to `out` [splits, rows, width].

    Reads each weight once for every row tile.
    """
    await_inputs()
    row_tiles = tl.cdiv(rows, BLOCK_M)
    row = (tl.program_id(0) % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    column = (tl.program_id(0) // row_tiles * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    row_mask, column_mask = row < rows, column < width
    mask = row_mask[:, None] & column_mask[None, :]
    if WHOLE:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for split in range(splits):
            start = split * split_size
            stop = tl.minimum(start + split_size, size)
            total += split_sum(x, weight, row, row_mask, column, column_mask, start, stop, size, BLOCK_K, EVEN_K)
        finish(total, bias, out, row[:, None], column[None, :], mask, width, HAS_BIAS, ADD)
    else:
        split = tl.program_id(1)
        start = split * split_size
        stop = tl.minimum(start + split_size, size)
        total = split_sum(x, weight, row, row_mask, column, column_mask, start, stop, size, BLOCK_K, EVEN_K)
        place = out + (split * rows + row[:, None]) * width + column[None, :]
        tl.store(place, total, mask=mask)


@triton.jit
def ordered_sum(sums, rows, width, row, column, mask, SPLITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The splits' sums [SPLITS, rows, width] at [row, column] added up in order; masked ones are 0. For kernels."""
    total = tl.load(sums + row * width + column, mask=mask, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(sums + (split * rows + row) * width + column, mask=mask, other=0.0)
    return total


@triton.jit(do_not_specialize=["rows"])
def _reduce_kernel(  # type: ignore[no-untyped-def]
    sums,
    bias,
    out,
    rows,
    width,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADD: tl.constexpr,
):
    """Out [rows, width] from the splits' sums [SPLITS, rows, width]. Program (i, row): BLOCK outputs of one row."""
    await_inputs()
    row = tl.program_id(1).to(tl.int64)
    column = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    mask = column < width
    total = ordered_sum(sums, rows, width, row, column, mask, SPLITS)
    finish(total, bias, out, row, column, mask, width, HAS_BIAS, ADD)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    out: Tensor | None = None,
    add: bool = False,
    workspace: Workspace,
) -> Tensor:
    """x @ weight.T + bias in float32; a row's bits do not depend on the other rows.

    Args:
        x: [rows, in], contiguous, of the weight's type.
        weight: [out, in], contiguous, bfloat16 or float32.
        bias: [out], or none.
        out: float32 [rows, out], contiguous; allocated if left out.
        add: Add to `out` instead of writing over it, as the residual stream wants.
        workspace: Of at least `scratch_bytes`.

    Returns:
        `out`.

    Raises:
        ValueError: A shape, type or layout is not as above, or `add` without `out`.
    """
    rows, (width, size) = len(x), weight.shape
    if out is None:
        if add:
            raise ValueError("add needs out, the tensor to add to")
        out = torch.empty(rows, width, dtype=torch.float32, device=x.device)
    check("weight", weight, (width, size), DTYPES)
    check("x", x, (rows, size), (weight.dtype,))
    check("out", out, (rows, width), (torch.float32,))
    if bias is not None:
        check("bias", bias, (width,), DTYPES)
    if rows == 0:
        return out
    sums = split_sums(x, weight, workspace=workspace)
    if sums is None:
        tile = tile_for(Layout.OUT_IN, width, size, weight.dtype, weight.device)
        launch_product(x, weight, tile, out, whole=True, bias=bias, add=add)
    else:
        launch_reduce(sums, out, bias=bias, add=add)
    return out


def split_sums(x: Tensor, weight: Tensor, *, workspace: Workspace) -> Tensor | None:
    """x @ weight.T as the sums of its splits, which whoever reads them has to add in order; of few rows only.

    Args:
        x: See `linear`.
        weight: Likewise.
        workspace: Likewise; nothing else may use it until the sums have been read.

    Returns:
        float32 [splits, rows, out]; None, and nothing is computed, where a program goes through all splits itself.

    Raises:
        ValueError: A shape, type or layout is not as `linear` wants it.
    """
    rows, (width, size) = len(x), weight.shape
    check("weight", weight, (width, size), DTYPES)
    check("x", x, (rows, size), (weight.dtype,))
    tile = tile_for(Layout.OUT_IN, width, size, weight.dtype, weight.device)
    if rows == 0 or is_whole(tile, rows, size):
        return None
    (sums,) = workspace.carve([((tile.split_count(size), rows, width), torch.float32)])
    launch_product(x, weight, tile, sums, whole=False)
    return sums


def scratch_bytes(width: int, size: int, dtype: torch.dtype, device: torch.device, layout: Layout) -> int:
    """Bytes of workspace for products by a weight of this shape, with any number of rows."""
    splits = tile_for(layout, width, size, dtype, device).split_count(size)
    return bytes_of([((splits, ROW_TILE, width), torch.float32)])


def is_whole(tile: Tile, rows: int, size: int) -> bool:
    """Whether a program goes through all splits. Both ways have the same bits: this one is for many rows."""
    return rows > ROW_TILE or tile.split_count(size) == 1


def launch_product(
    x: Tensor, weight: Tensor, tile: Tile, out: Tensor, *, whole: bool, bias: Tensor | None = None, add: bool = False
) -> None:
    """Start `_product_kernel`; checks nothing.

    Args:
        out: float32 [rows, out] if `whole`, else [splits, rows, out].
        whole: All splits in one program.
        bias: If `whole`.
        add: If `whole`.
    """
    rows, (width, size) = len(x), weight.shape
    splits = tile.split_count(size)
    tiles = triton.cdiv(rows, ROW_TILE) * triton.cdiv(width, tile.block_n)
    _product_kernel[(tiles, 1 if whole else splits)](
        x,
        weight,
        bias,
        out,
        rows,
        size,
        width,
        tile.split_size(size),
        splits,
        WHOLE=whole,
        HAS_BIAS=bias is not None,
        ADD=add,
        **tile.launch_options(size, rows),
        **OVERLAPPED,
    )


def launch_reduce(sums: Tensor, out: Tensor, *, bias: Tensor | None = None, add: bool = False) -> None:
    """Start `_reduce_kernel`: sums float32 [splits, rows, out] to `out` float32 [rows, out]; checks nothing."""
    splits, rows, width = sums.shape
    _reduce_kernel[(triton.cdiv(width, REDUCED_OUTPUTS), rows)](
        sums,
        bias,
        out,
        rows,
        width,
        SPLITS=splits,
        BLOCK=REDUCED_OUTPUTS,
        HAS_BIAS=bias is not None,
        ADD=add,
        **OVERLAPPED,
    )


def check(name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    """Refuse a tensor that a kernel would misread.

    Raises:
        ValueError: Names the tensor, what it is and what it should be.
    """
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name} must be {allowed}, got {tensor.dtype}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
