"""Numbers for tests of integer kernels, chosen so that results can be told exactly."""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from engine.kernels.cpu.simd import element_pointer, load_as, store_as

Array = NDArray[Any]
rng = np.random.default_rng


def integers(*shape: int, seed: int, most: int, dtype: Any) -> Array:
    """Random integers, the largest ones among them."""
    values = rng(seed).integers(-most, most + 1, shape)
    values.reshape(-1)[::5] = most
    values.reshape(-1)[1::7] = -most
    return values.astype(dtype)


def powers(*shape: int, seed: int) -> Array:
    """float32 that bfloat16 holds exactly and that products with integers keep exact."""
    return (2.0 ** rng(seed).integers(-20, -9, shape)).astype(np.float32)


def bits(values: Array) -> Array:
    """bfloat16 bits."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def integer_vector(bits: int, count: int) -> ir.VectorType:
    return ir.VectorType(ir.IntType(bits), count)


def compiled(generate: Callable[..., Any], *kinds: ir.VectorType) -> Callable[..., None]:
    """A function of `out` and arrays that hold a vector of each kind; what `generate` makes of these goes to `out`.

    `generate(builder, *vectors)` generates code. `out` may be one of the arrays.
    """

    @intrinsic
    def call(typingctx: Any, out: Any, arrays: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            first = ir.Constant(ir.IntType(64), 0)
            arguments = [builder.extract_value(args[1], i) for i in range(len(kinds))]
            pointers = [
                element_pointer(context, builder, own, argument, first)
                for own, argument in zip(signature.args[1], arguments, strict=True)
            ]
            vectors = [load_as(builder, p, kind) for p, kind in zip(pointers, kinds, strict=True)]
            target = element_pointer(context, builder, signature.args[0], args[0], first)
            store_as(builder, generate(builder, *vectors), target)
            return context.get_dummy_value()

        return types.void(out, arrays), codegen

    @njit
    def run(out, *arrays):  # type: ignore[no-untyped-def]
        call(out, arrays)

    return run
