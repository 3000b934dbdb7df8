"""Scratch memory of kernels."""

import pytest
import torch

from engine.kernels.triton.workspace import ALIGNMENT, Workspace, bytes_of

PARTS = [((3, 5), torch.float32), ((7,), torch.uint8), ((0, 4), torch.int32), ((2, 2), torch.bfloat16)]


def test_parts_have_their_shapes_and_types_and_do_not_overlap() -> None:
    parts = Workspace(bytes_of(PARTS), "cpu").carve(PARTS)
    for number, part in enumerate(parts):
        part.fill_(number)

    assert [(tuple(part.shape), part.dtype) for part in parts] == PARTS
    assert all((part == number).all() for number, part in enumerate(parts))
    assert all((part.data_ptr() - parts[0].data_ptr()) % ALIGNMENT == 0 for part in parts if part.numel())


def test_the_same_memory_serves_the_next_call() -> None:
    workspace = Workspace(bytes_of(PARTS), "cpu")

    assert workspace.carve(PARTS)[0].data_ptr() == workspace.carve(PARTS)[0].data_ptr()


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="workspace of 100 bytes is too small: 1024 are needed"):
        Workspace(100, "cpu").carve([((256,), torch.float32)])
