"""How the kernels are compiled, and when they run in parallel."""

# No "reassoc": a sum keeps the order in which it is written, so that the same row gives the same bits in any batch.
# Division by zero gives infinity as in NumPy; Python's exception would keep loops from being vectorised.
OPTIONS = {"cache": True, "nogil": True, "error_model": "numpy", "fastmath": {"contract", "nnan", "nsz"}}

FEW_ROWS = 8  # up to which the calling thread lays rows out alone: waking others would take longer
