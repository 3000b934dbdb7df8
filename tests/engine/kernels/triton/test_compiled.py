"""Kernels compile for GPUs, also where there is none, and what holds results together is in the compiled code.

The compiler runs in a process of its own, for in this one Triton interprets.
"""

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest

ARCHITECTURES = {"80": "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "90": "wgmma.mma_async.sync.aligned.m64n"}
OUTPUTS = re.compile(r"n\d+(?=k16)|(?<=m64)n$")  # of a matrix instruction's shape
SHARED_BYTES = 99 * 1024  # of a program, on the smaller devices of compute capability 8.6 and 8.9
SPILLED_BYTES = 16  # of a thread, at most
PRODUCTS = ("_product_kernel", "_gathered_kernel", "_down_kernel")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def compiled(request: pytest.FixtureRequest) -> tuple[str, dict[str, list[dict[str, Any]]]]:
    """Compute capability, and the kernels of each launch."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "tests.engine.kernels.triton.compiler", request.param]
    run = subprocess.run(
        [*command, "tests.engine.kernels.triton.feed_forward_launches"],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr
    return request.param, json.loads(run.stdout)


def test_every_launch_compiles(compiled: tuple[str, dict[str, list[dict[str, Any]]]]) -> None:
    _, launches = compiled
    names = {name: [kernel["kernel"] for kernel in kernels] for name, kernels in launches.items()}

    assert names["sparse decode bfloat16"] == [
        "_product_kernel",
        "_activate_kernel",
        "_gathered_kernel",
        "_multiply_kernel",
        "_down_kernel",
        "_reduce_kernel",
    ]
    assert names["linear prompt bfloat16"] == ["_product_kernel"]
    assert names["sparse decode float32"] == names["sparse decode bfloat16"]


def test_a_weight_meets_one_matrix_instruction_in_every_schedule_and_path(
    compiled: tuple[str, dict[str, list[dict[str, Any]]]],
) -> None:
    """But for its number of outputs, which are independent of each other."""
    capability, launches = compiled
    kernels = [kernel for name, some in launches.items() if "bfloat16" in name for kernel in some]
    by_inputs, by_outputs = (
        {
            tuple(OUTPUTS.sub("", instruction) for instruction in kernel["instructions"])
            for kernel in kernels
            if kernel["kernel"] in names
        }
        for names in (("_product_kernel", "_gathered_kernel"), ("_down_kernel",))
    )

    for instructions in (by_inputs, by_outputs):
        ((instruction,),) = instructions
        assert instruction.startswith(OUTPUTS.sub("", ARCHITECTURES[capability]))


def test_float32_meets_no_matrix_instruction_that_rounds_it(
    compiled: tuple[str, dict[str, list[dict[str, Any]]]],
) -> None:
    kernels = [kernel for name, some in compiled[1].items() if "float32" in name for kernel in some]
    assert all(kernel["instructions"] == [] for kernel in kernels)


def test_weights_come_in_copies_of_16_bytes(compiled: tuple[str, dict[str, list[dict[str, Any]]]]) -> None:
    for kernels in compiled[1].values():
        for kernel in kernels:
            if kernel["kernel"] in PRODUCTS:
                assert 16 in kernel["copies"]
            assert set(kernel["copies"]) <= {4, 16}


def test_bfloat16_decoding_keeps_its_values_in_registers_and_fits_small_devices(
    compiled: tuple[str, dict[str, list[dict[str, Any]]]],
) -> None:
    for name, kernels in compiled[1].items():
        for kernel in kernels:
            assert kernel["shared"] <= SHARED_BYTES
            if name.endswith("decode bfloat16"):
                assert kernel["local"] == 0
                assert kernel["stack"] <= SPILLED_BYTES, kernel
