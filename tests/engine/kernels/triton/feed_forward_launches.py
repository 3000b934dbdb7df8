"""Launches of linear and feed-forward products at a real model's shapes, for `compiler`. Tensors are never read."""

from collections.abc import Callable, Iterator

import torch

from engine.activation import ActivationRows, PositiveBranch
from engine.kernels.triton.feed_forward import feed_forward, scratch_bytes
from engine.kernels.triton.linear import Workspace, linear

HIDDEN, INTERMEDIATE = 4096, 11008
ROWS = {
    torch.bfloat16: {"decode": 1, "prompt": 128},
    torch.float32: {"decode": 1},  # the others take long to compile
}


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """By schedule, path and type of the weights."""
    for dtype, schedules in ROWS.items():
        name = str(dtype).removeprefix("torch.")
        gate = torch.empty(INTERMEDIATE, HIDDEN, dtype=dtype)
        bias, workspace = torch.empty(HIDDEN, dtype=dtype), Workspace(scratch_bytes(gate), "cpu")
        for schedule, rows in schedules.items():
            x = torch.empty(rows, HIDDEN, dtype=dtype)
            out = torch.empty(rows, HIDDEN)
            integers = torch.zeros(rows, dtype=torch.int64)
            keys = torch.zeros(rows, 2, dtype=torch.int64)
            activations = ActivationRows(integers, integers, keys, integers, PositiveBranch.IDENTITY)
            square = gate[:HIDDEN]
            yield (
                f"linear {schedule} {name}",
                lambda x=x, out=out, square=square, bias=bias, workspace=workspace: linear(
                    x, square, bias, out=out, add=True, workspace=workspace
                ),
            )
            for path in ("dense", "sparse"):
                yield (
                    f"{path} {schedule} {name}",
                    lambda x=x, gate=gate, activations=activations, path=path, workspace=workspace, out=out: (
                        feed_forward(
                            x,
                            gate,
                            gate,
                            gate,
                            activations,
                            0,
                            skip_zeros=path == "sparse",
                            workspace=workspace,
                            out=out,
                            zeros=activations.positions,
                        )
                    ),
                )
