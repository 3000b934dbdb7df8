"""Launches that begin while the launch before still runs (programmatic dependent launch, compute capability 9.0 on).

A decoding step is hundreds of short launches, one after another. With `OVERLAPPED` the programs of a launch take the
places of those of the launch before as they become free, and wait in `await_inputs` until all of that is done and
written: what a launch costs to begin is no longer paid between two launches.

Every kernel that is launched so must call `await_inputs` in every program, before it reads or writes memory: then the
end of a launch is the end of all launches before it, too.
"""

import os

import torch
import triton
import triton.language as tl

from engine.kernels.triton.arithmetic import INTERPRETED

CAPABILITY = (9, 0)
SWITCH = "SILUETTE_OVERLAP_LAUNCHES"  # 0: launch one after another, to compare


def _can_overlap() -> bool:
    if INTERPRETED.value or os.environ.get(SWITCH) == "0" or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability() >= CAPABILITY


OVERLAP = tl.constexpr(_can_overlap())
# Options of a launch.
OVERLAPPED: dict[str, bool] = {"launch_pdl": True} if OVERLAP.value else {}


@triton.jit
def await_inputs():  # type: ignore[no-untyped-def]
    """Wait for all launches before this one, then let the next one come; for kernels launched with `OVERLAPPED`."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
