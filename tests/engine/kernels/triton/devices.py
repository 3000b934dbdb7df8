"""Where the Triton kernels run in tests: on the GPU if there is one, else in Triton's interpreter."""

from dataclasses import replace

import pytest
import torch

from engine.activation import ActivationRows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROWS = (0, 1, 3, 8, 33)  # numbers of token rows that kernels are tried with

every_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])


def on_device(rows: ActivationRows) -> ActivationRows:
    """The same activations, where kernels can read them."""
    return replace(
        rows,
        mode=rows.mode.to(DEVICE),
        threshold=rows.threshold.to(DEVICE),
        keys=rows.keys.to(DEVICE),
        positions=rows.positions.to(DEVICE),
    )
