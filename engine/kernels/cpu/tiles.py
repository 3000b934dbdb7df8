"""AMX for Numba: eight tile registers, each up to 16 rows of 64 bytes, and products of two of them added to a third.

A thread says what shape its tiles have (`configure`) before it touches them and gives them back (`release`) afterwards.
Tile numbers are literals. Arrays are contiguous; places in them are element indices, strides are bytes.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from engine.kernels.cpu.simd import element_pointer

ROWS = 16  # of a tile, at most
ROW_BYTES = 64

_BYTE, _LONG = ir.IntType(8), ir.IntType(64)
_POINTER = _BYTE.as_pointer()


def tile_config(shapes: dict[int, tuple[int, int]]) -> NDArray[np.uint8]:
    """The 64 bytes that `configure` loads: (rows, bytes of a row) of each tile that is used."""
    rows, row_bytes = np.zeros(16, np.uint8), np.zeros(16, np.uint16)
    for tile, (number, width) in shapes.items():
        rows[tile], row_bytes[tile] = number, width
    head = np.zeros(16, np.uint8)
    head[0] = 1  # palette
    return np.concatenate((head, row_bytes.view(np.uint8), rows))


def _call(builder: Any, name: str, *args: Any) -> None:
    function = ir.FunctionType(ir.VoidType(), [arg.type for arg in args])
    builder.call(cgutils.get_or_insert_function(builder.module, function, f"llvm.x86.{name}"), args)


def _address(context: Any, builder: Any, array_type: Any, array: Any, at: Any) -> Any:
    return builder.bitcast(element_pointer(context, builder, array_type, array, at), _POINTER)


def _tile(literal: Any) -> Any:
    return ir.Constant(_BYTE, literal.literal_value)


@intrinsic
def configure(typingctx: Any, config: Any) -> Any:
    """Give this thread's tiles their shapes, from `tile_config`; they become 0."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = _address(context, builder, signature.args[0], args[0], ir.Constant(_LONG, 0))
        _call(builder, "ldtilecfg", address)
        return context.get_dummy_value()

    return types.void(config), codegen


@intrinsic
def release(typingctx: Any) -> Any:
    """Leave this thread's tiles, so that the system need not save them."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _call(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic(prefer_literal=True)
def clear(typingctx: Any, tile: Any) -> Any:
    """tile = 0."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _call(builder, "tilezero", _tile(tile))
        return context.get_dummy_value()

    return types.void(tile), codegen


def _memory(name: str) -> Any:
    def typing(typingctx: Any, tile: Any, array: Any, at: Any, stride: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            address = _address(context, builder, signature.args[1], args[1], args[2])
            _call(builder, name, _tile(tile), address, args[3])
            return context.get_dummy_value()

        return types.void(tile, array, types.intp, types.intp), codegen

    return typing


def _product(name: str) -> Any:
    def typing(typingctx: Any, total: Any, left: Any, right: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _call(builder, name, _tile(total), _tile(left), _tile(right))
            return context.get_dummy_value()

        return types.void(total, left, right), codegen

    return typing


load = intrinsic(prefer_literal=True)(_memory("tileloadd64"))  # tile = its rows from array[at], `stride` bytes apart
store = intrinsic(prefer_literal=True)(_memory("tilestored64"))  # the way back
# total[m, n] += left[m, k] * right[k / 2, n, k % 2], float32 += bfloat16 * bfloat16, over k in order
multiply_bfloat16 = intrinsic(prefer_literal=True)(_product("tdpbf16ps"))
# total[m, n] += left[m, k] * right[k / 4, n, k % 4], int32 += int8 * int8, exact
multiply_int8 = intrinsic(prefer_literal=True)(_product("tdpbssd"))
