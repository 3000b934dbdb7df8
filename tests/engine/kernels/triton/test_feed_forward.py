"""The gated feed-forward layer: what it computes, and that neither batch-mates nor skipped zeros change a bit."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.activation import ActivationRows, PositiveBranch
from engine.kernels.triton.feed_forward import feed_forward, scratch_bytes
from engine.kernels.triton.linear import Workspace
from tests.engine.kernels.triton.blocks import Block, make_block, mixed_rows, relu_rows
from tests.engine.kernels.triton.devices import DEVICE, ROWS, every_dtype, on_device

HIDDEN, INTERMEDIATE, LAYER = 72, 200, 3
# Of the largest output: float32 sums, or hidden values rounded once to bfloat16's 8 bits.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 0.006}


def run(block: Block, rows: ActivationRows, *, skip_zeros: bool, layer: int = LAYER) -> tuple[Tensor, Tensor]:
    """Output, added to zeros, and zeros of each row; scratch memory is full of NaNs before."""
    workspace = Workspace(scratch_bytes(block.gate), DEVICE)
    (garbage,) = workspace.carve([((workspace.size // 4,), torch.float32)])
    garbage.fill_(torch.nan)
    out = torch.zeros(len(block.x), HIDDEN, device=DEVICE)
    zeros = torch.full((len(block.x),), 99, device=DEVICE)
    feed_forward(
        block.x,
        block.gate,
        block.up,
        block.down,
        on_device(rows),
        layer,
        skip_zeros=skip_zeros,
        workspace=workspace,
        out=out,
        zeros=zeros,
    )
    return out.cpu(), zeros.cpu()


def some_rows(rows: ActivationRows, index: list[int]) -> ActivationRows:
    return replace(
        rows,
        mode=rows.mode[index],
        threshold=rows.threshold[index],
        keys=rows.keys[index],
        positions=rows.positions[index],
    )


@every_dtype
@pytest.mark.parametrize("zeros", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("count", ROWS)
def test_relu_rows_equal_the_definition_and_zeros_may_be_skipped(count: int, zeros: float, dtype: torch.dtype) -> None:
    block, rows = make_block(count, HIDDEN, INTERMEDIATE, dtype, zeros), relu_rows(count)
    expected, expected_zeros = block.expected(rows, LAYER)

    out, found_zeros = run(block, rows, skip_zeros=False)
    sparse_out, sparse_zeros = run(block, rows, skip_zeros=True)

    assert torch.equal(sparse_out, out)
    scale = expected.abs().max().item() if count else 0
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=TOLERANCE[dtype] * scale)
    assert found_zeros.tolist() == sparse_zeros.tolist() == expected_zeros.tolist()
    if count and zeros in (0, 1):
        assert found_zeros.tolist() == [zeros * INTERMEDIATE] * count


@every_dtype
@pytest.mark.parametrize("branch", PositiveBranch)
@pytest.mark.parametrize("count", [1, 8, 33])
def test_rows_of_all_modes_equal_the_definition(count: int, branch: PositiveBranch, dtype: torch.dtype) -> None:
    block, rows = make_block(count, HIDDEN, INTERMEDIATE, dtype), mixed_rows(count, branch)
    expected, expected_zeros = block.expected(rows, LAYER)

    out, zeros = run(block, rows, skip_zeros=False)
    sparse_out, _ = run(block, rows, skip_zeros=True)

    torch.testing.assert_close(out.double(), expected, rtol=0, atol=TOLERANCE[dtype] * expected.abs().max().item())
    assert zeros.tolist() == expected_zeros.tolist()
    assert torch.equal(sparse_out, out)


@every_dtype
def test_a_row_has_the_same_bits_in_any_batch_and_by_any_path(dtype: torch.dtype) -> None:
    block, rows = make_block(66, HIDDEN, INTERMEDIATE, dtype, 0.8), mixed_rows(66)
    whole, zeros = run(block, rows, skip_zeros=False)

    for index in ([4], [65], [65, 0, 33]):
        for skip_zeros in (False, True):
            part = replace(block, x=block.x[index])
            out, part_zeros = run(part, some_rows(rows, index), skip_zeros=skip_zeros)
            assert torch.equal(out, whole[index])
            assert torch.equal(part_zeros, zeros[index])


def test_more_rows_than_scratch_memory_holds_go_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.kernels.triton.feed_forward.ROWS_AT_ONCE", 8)
    block, rows = make_block(10, HIDDEN, INTERMEDIATE, torch.float32), mixed_rows(10)
    out, zeros = run(block, rows, skip_zeros=True)
    monkeypatch.undo()
    expected, expected_zeros = run(block, rows, skip_zeros=True)

    assert torch.equal(out, expected)
    assert torch.equal(zeros, expected_zeros)


@pytest.mark.filterwarnings("ignore:invalid value")  # of NumPy, by which the interpreter computes
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_spoils_no_other(poison: float) -> None:
    block, rows = make_block(3, HIDDEN, INTERMEDIATE, torch.bfloat16, 0.9), relu_rows(3)
    clean, _ = run(block, rows, skip_zeros=True)
    block.x[1, 5] = poison

    dense, _ = run(block, rows, skip_zeros=False)
    sparse, _ = run(block, rows, skip_zeros=True)

    assert not sparse[1].isfinite().all()
    assert torch.equal(sparse.view(torch.int32), dense.view(torch.int32))
    assert torch.equal(sparse[[0, 2]], clean[[0, 2]])


@pytest.mark.filterwarnings("ignore:invalid value")  # of NumPy, by which the interpreter computes
def test_an_infinite_up_weight_of_an_idle_neuron_is_never_met() -> None:
    block, rows = make_block(3, HIDDEN, INTERMEDIATE, torch.bfloat16, 0.5), relu_rows(3)
    gate = block.x.float() @ block.gate.float().t()
    idle = (gate < 0).all(0)
    clean, _ = run(block, rows, skip_zeros=False)
    block.up[idle] = torch.inf

    assert idle.any()
    for skip_zeros in (False, True):
        assert torch.equal(run(block, rows, skip_zeros=skip_zeros)[0], clean)


def test_is_added_to_the_residual_stream() -> None:
    block, rows = make_block(3, HIDDEN, INTERMEDIATE, torch.float32), on_device(relu_rows(3))
    workspace, zeros = Workspace(scratch_bytes(block.gate), DEVICE), torch.empty(3, dtype=torch.int32, device=DEVICE)
    weights = (block.x, block.gate, block.up, block.down)
    out = torch.ones(3, HIDDEN, device=DEVICE)
    plain, _ = run(block, relu_rows(3), skip_zeros=False)

    feed_forward(*weights, rows, LAYER, skip_zeros=False, workspace=workspace, out=out, zeros=zeros)

    assert torch.equal(out.cpu(), 1 + plain)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("down", torch.zeros(HIDDEN, INTERMEDIATE), r"down must have shape \[200, 72\], got \[72, 200\]"),
        ("up", torch.zeros(INTERMEDIATE, HIDDEN, dtype=torch.bfloat16), "up must be torch.float32"),
        ("x", torch.zeros(HIDDEN, 2).t(), "x must be contiguous"),
    ],
)
def test_bad_input_is_refused_by_name(name: str, wrong: Tensor, message: str) -> None:
    block = replace(make_block(2, HIDDEN, INTERMEDIATE, torch.float32), **{name: wrong.to(DEVICE)})
    with pytest.raises(ValueError, match=message):
        run(block, relu_rows(2), skip_zeros=False)
