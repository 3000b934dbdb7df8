"""The gated feed-forward layer, down(act(gate x) * up x), with or without reading weights of idle neurons.

Six launches, which differ between the two paths in two points only:

1. gate x, split sums (`linear`)
2. activation, zeros, list of active neurons (`activation`)
3. up x, split sums: of all neurons (`linear`), or of active ones (`up`)
4. times the activated gate, rounded to the weights' type: hidden values (`up`)
5. down, split sums: reading all weights, or those of active neurons (`down`)
6. splits added in order, added to the residual stream (`linear`), unless the norm that follows is to do it (`norm`);
   for many rows step 5 does that itself

Both paths give the same bits, so the router may choose by cost. Counts of neurons stay on the device, nothing is
allocated, and there are no atomics, so that the launches can be captured in a CUDA graph.

Where this differs from plain PyTorch: gate, activation and up are float32 until their product is rounded once; a
neuron whose activation is 0 gives 0 even if its up value is not finite. Weights of `down` must be finite.
"""

from dataclasses import replace

import torch
from torch import Tensor

from engine.activation import ActivationRows
from engine.kernels.triton.activation import ActiveNeurons, activate, zero_counts_part
from engine.kernels.triton.down import launch_down
from engine.kernels.triton.linear import DTYPES, check, is_whole, launch_product, launch_reduce
from engine.kernels.triton.tuning import ROW_TILE, Layout, Tile, tile_for
from engine.kernels.triton.up import launch_gathered, launch_multiply
from engine.kernels.triton.workspace import Part, Workspace, bytes_of

ROWS_AT_ONCE = 8 * ROW_TILE  # more go in several turns, so that scratch memory has an end


def feed_forward(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    rows: ActivationRows,
    layer: int,
    *,
    skip_zeros: bool,
    workspace: Workspace,
    out: Tensor,
    zeros: Tensor,
    defer: bool = False,
) -> Tensor | None:
    """out += down(act(gate x) * up x); a row's bits depend neither on the other rows nor on `skip_zeros`.

    Args:
        x: [rows, hidden], contiguous, of the weights' type.
        gate: [intermediate, hidden], contiguous, bfloat16 or float32.
        up: Likewise.
        down: [intermediate, hidden], neuron-major, likewise.
        rows: The rows' activations, on the same device.
        layer: Decoder layer, part of the random counter.
        skip_zeros: Read weights of `up` and `down` for neurons only that are not 0 in some row of a tile.
        workspace: Of at least `scratch_bytes`.
        out: float32 [rows, hidden], contiguous; added to.
        zeros: int32 or int64 [rows], written: values of act(gate x) that are exactly 0.
        defer: Of few rows, leave the last sum to whoever reads `out` next.

    Returns:
        None; or what is still to be added to `out`, float32 [splits, rows, hidden], in order. It lies in `workspace`.

    Raises:
        ValueError: A shape, type or layout is not as above, or the workspace is too small.
    """
    count, (intermediate, hidden) = len(x), gate.shape
    check("gate", gate, (intermediate, hidden), DTYPES)
    check("up", up, (intermediate, hidden), (gate.dtype,))
    check("down", down, (intermediate, hidden), (gate.dtype,))
    check("x", x, (count, hidden), (gate.dtype,))
    check("out", out, (count, hidden), (torch.float32,))
    check("zeros", zeros, (count,), (torch.int32, torch.int64))
    sums = None
    for first in range(0, count, ROWS_AT_ONCE):
        some = slice(first, first + ROWS_AT_ONCE)
        part = replace(
            rows,
            mode=rows.mode[some],
            threshold=rows.threshold[some],
            keys=rows.keys[some],
            positions=rows.positions[some],
        )
        sums = _feed_forward(x[some], gate, up, down, part, layer, skip_zeros, workspace, out[some], zeros[some])
        if sums is not None and not defer:
            launch_reduce(sums, out[some], add=True)
    return sums if defer else None


def _feed_forward(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    rows: ActivationRows,
    layer: int,
    skip_zeros: bool,
    workspace: Workspace,
    out: Tensor,
    zeros: Tensor,
) -> Tensor | None:
    """What is still to be added to `out`, or None."""
    count, (intermediate, hidden) = len(x), gate.shape
    wide, back = _tiles(gate)
    sums, back_sums, activated, h, zero_counts, *lists = workspace.carve(_parts(count, hidden, gate, wide, back))
    active = ActiveNeurons(*lists) if skip_zeros else None
    whole = is_whole(wide, count, hidden)

    launch_product(x, gate, wide, sums, whole=whole)
    activate(sums, rows, layer, out=activated, zero_counts=zero_counts, active=active)
    if active is None:
        launch_product(x, up, wide, sums, whole=whole)
    else:
        listed, back = _tiles(gate, skipping=True)
        launch_gathered(x, up, listed, active, sums, whole=whole)
    launch_multiply(activated, sums, zero_counts, h, zeros)
    flags = None if active is None else active.flags
    if is_whole(back, count, intermediate):
        launch_down(h, down, back, flags, out, whole=True)
        return None
    launch_down(h, down, back, flags, back_sums, whole=False)
    return back_sums


def _tiles(gate: Tensor, *, skipping: bool = False) -> tuple[Tile, Tile]:
    """Of `gate` and `up`, and of `down`; `skipping` where weights of active neurons only are read."""
    intermediate, hidden = gate.shape
    return (
        tile_for(Layout.OUT_IN, intermediate, hidden, gate.dtype, gate.device, skipping=skipping),
        tile_for(Layout.IN_OUT, hidden, intermediate, gate.dtype, gate.device, skipping=skipping),
    )


def _parts(count: int, hidden: int, gate: Tensor, wide: Tile, back: Tile) -> list[Part]:
    """Scratch memory of so many rows: split sums of gate and up, of down, activated, hidden values, zeros, lists."""
    intermediate = len(gate)
    splits = 1 if is_whole(wide, count, hidden) else wide.split_count(hidden)
    back_splits = 0 if is_whole(back, count, intermediate) else back.split_count(intermediate)
    return [
        ((splits, count, intermediate), torch.float32),
        ((back_splits, count, hidden), torch.float32),
        ((count, intermediate), torch.float32),
        ((count, intermediate), gate.dtype),
        zero_counts_part(count, intermediate),
        *ActiveNeurons.parts(count, intermediate),
    ]


def scratch_bytes(gate: Tensor) -> int:
    """Bytes of workspace for a layer with such a gate [intermediate, hidden], with any number of rows."""
    hidden = gate.shape[1]
    wide, back = _tiles(gate)
    return max(bytes_of(_parts(count, hidden, gate, wide, back)) for count in (ROW_TILE, ROWS_AT_ONCE))
