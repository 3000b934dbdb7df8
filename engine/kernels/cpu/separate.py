"""Calls of compiled functions that stay compiled by themselves.

Numba copies what a function calls into it, and optimises the whole again, at each level of calls: with all kernels of a
step below one function that takes most of the time of a first start. What is called as here is compiled once, for all
its callers. It costs them a call, so it is for functions that run for microseconds.
"""

import hashlib
from functools import partial
from importlib import import_module
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_symbols: dict[str, Any] = {}  # what is compiled, and so must stay, by its symbol


def _symbol_for(module: str, name: str, kinds: tuple[Any, ...]) -> str:
    """Compile a function of a module for argument types, or load it; returns the symbol that callers find it by."""
    symbol = f"{module}.{name}.{hashlib.sha256(str(kinds).encode()).hexdigest()[:16]}"
    if symbol not in _symbols:
        function = getattr(import_module(module), name)
        function.compile(kinds)
        compiled = function.overloads[kinds]
        address = compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)
        llvmlite.binding.add_symbol(symbol, address)
        _symbols[symbol] = compiled
    return symbol


def argument_types(args: Any) -> tuple[Any, ...]:
    """What a function that is called with a tuple of arguments is compiled for."""
    return tuple(map(types.unliteral, args.types))


def declare(context: Any, builder: Any, function: Any, kinds: tuple[Any, ...]) -> tuple[Any, Any]:
    """A separately compiled function in the module at hand, and its signature.

    Args:
        function: Type of a compiled function that has a name in its module.
        kinds: What it is called with.
    """
    python = function.dispatcher.py_func
    load = partial(_symbol_for, python.__module__, python.__name__, kinds)
    symbol = load()
    # Machine code from Numba's cache has the symbol, too, which must have its address before that code is loaded.
    context.active_code_library._reload_init.add(load)
    compiled = _symbols[symbol]
    kind = context.call_conv.get_function_type(compiled.fndesc.restype, compiled.fndesc.argtypes)
    return cgutils.get_or_insert_function(builder.module, kind, symbol), compiled.signature


@intrinsic
def call_separately(typingctx: Any, function: Any, args: Any) -> Any:
    """function(*args), compiled by itself (for use in kernels only). It returns nothing.

    In a function that other kernels call normally, use `UNCACHED`.
    """
    kinds = argument_types(args)
    function.get_call_type(typingctx, kinds, {})

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        callee, called = declare(context, builder, function, kinds)
        unpacked = [builder.extract_value(values[1], i) for i in range(len(kinds))]
        status, _ = context.call_conv.call_function(builder, callee, types.none, called.args, unpacked)
        with cgutils.if_unlikely(builder, status.is_error):
            context.call_conv.return_status_propagate(builder, status)
        return ir.Constant(context.get_value_type(types.none), None)

    return types.void(function, args), codegen
