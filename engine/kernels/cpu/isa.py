"""What this processor has, as far as kernels are built for it.

AMX: tiles that multiply 16 x 32 by 32 x 16 bfloat16 in one instruction. VNNI, products of integers in vectors of 512
bits, comes with it, and kernels for AMX use both.
"""

import ctypes
import platform
from functools import cache

import llvmlite.binding

_ARCH_PRCTL = 158  # system call number on x86-64
_REQUEST_PERMISSION = 0x1023  # ARCH_REQ_XCOMP_PERM
_TILE_DATA = 18  # XFEATURE_XTILEDATA


@cache
def features() -> frozenset[str]:
    """LLVM's names of what the processor has."""
    found = llvmlite.binding.get_host_cpu_features()
    return frozenset(name for name, present in found.items() if present)


def has_avx512() -> bool:
    """Whether there are 32 vector registers of 512 bits; with less there are 16 of 256, or as on ARM 32 of 128."""
    return {"avx512f", "avx512bw"} <= features()


def vector_set() -> str:
    """Name of the vector instructions in use, whose width decides in which order sums are taken."""
    return "AVX-512" if has_avx512() else "AVX2" if "avx2" in features() else platform.machine()


@cache
def has_amx() -> bool:
    """Whether tiles can be used. Asks Linux for its permission, which holds for all threads of this process."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    if not {"amx-tile", "amx-bf16", "amx-int8", "avx512vnni"} <= features():
        return False
    return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0
