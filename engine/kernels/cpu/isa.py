"""What this processor has beyond vectors: AMX, whose tiles multiply 16 x 32 by 32 x 16 bfloat16 in one instruction.

VNNI, products of bytes in vectors, comes with it, and kernels for AMX use both.
"""

import ctypes
import platform
from functools import cache

import llvmlite.binding

_ARCH_PRCTL = 158  # system call number on x86-64
_REQUEST_PERMISSION = 0x1023  # ARCH_REQ_XCOMP_PERM
_TILE_DATA = 18  # XFEATURE_XTILEDATA


@cache
def has_amx() -> bool:
    """Whether tiles can be used. Asks Linux for its permission, which holds for all threads of this process."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    features = llvmlite.binding.get_host_cpu_features()
    if not all(features.get(name) for name in ("amx-tile", "amx-bf16", "amx-int8", "avx512vnni")):
        return False
    return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0
