"""How the kernels are compiled, and up to where rows are few."""

# No "reassoc": a sum keeps the order in which it is written, so that the same row gives the same bits in any batch.
# Division by zero gives infinity as in NumPy; Python's exception would keep loops from being vectorised.
# Nobody calls kernels from C, so no wrapper for it need be compiled.
OPTIONS = {
    "cache": True,
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"contract", "nnan", "nsz"},
    "no_cfunc_wrapper": True,
}
# Of functions that only kernels call: Python cannot, it would meet no code at all.
INNER = {**OPTIONS, "no_cpython_wrapper": True}
# Of functions with `call_separately` or `launch` that other kernels call normally: one from Numba's cache does not tell
# the caller, which takes in its code, what must be loaded before. What is launched, called separately or called from
# Python is loaded by itself and may be cached.
UNCACHED = {**INNER, "cache": False}

FEW_ROWS = 8  # token rows up to which threads wait for weights, so that work is cut into long stretches of them
