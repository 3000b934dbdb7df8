"""Work for all compute threads: one launch, and many turns in it without Python, its lock or a pause in between.

A loop over `numba.prange` takes Python's lock each time it begins, for which it waits while the server's other threads
have it, and wakes and joins threads at each end, hundreds of times in a step. Here threads are launched once. In each
turn the work is cut in as many shares as there are threads. A thread takes its own share first, then any that nobody
has taken yet, and goes on when all are finished: so no turn ever waits for a thread that the system has not started.

What a share computes must not depend on the thread that takes it.
"""

import platform
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from engine.kernels.cpu import aligned
from engine.kernels.cpu.options import INNER
from engine.kernels.cpu.separate import argument_types, declare

# A thread that waits looks at so many shares (half a millisecond or so), then naps between looks: most likely another
# program has the core of the thread that it waits for. Linux gives a core back at once to who slept (some 50
# microseconds longer than was asked for), but not to who yielded.
SPINS, NAP_MICROSECONDS = 40000, 20
_WORDS = 16  # of memory for each share, two cache lines: processors fetch them in pairs
_STDERR = 2
_LONG, _VOID, _POINTER = ir.IntType(64), ir.VoidType(), ir.IntType(8).as_pointer()
_usleep = types.ExternalFunction("usleep", types.int32(types.uint32))


def make_progress(threads: int) -> NDArray[np.int64]:
    """How far each share of a launch's work is: set to 0 before a launch, then for `next_share` and `finish` alone."""
    return aligned.zeros((threads, _WORDS), np.int64)


def _load_numbas_threads() -> None:
    """Load Numba's threading layer, whose functions kernels call."""
    numba.get_num_threads()


def _call_numba(context: Any, builder: Any, name: str, result: Any, *args: Any) -> Any:
    """Call a function of the threading layer, which is loaded now, and before machine code from a cache is."""
    _load_numbas_threads()
    context.active_code_library._reload_init.add(_load_numbas_threads)
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


@intrinsic
def usable_threads(typingctx: Any) -> Any:
    """How many threads kernels that are called from this thread use, `numba.get_num_threads`, in code for the cache."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _call_numba(context, builder, "get_num_threads", _LONG)

    return types.intp(), codegen


@intrinsic
def launch(typingctx: Any, threads: Any, function: Any, args: Any) -> Any:
    """Call function(thread, *args), which returns nothing, for each thread < `threads`, on Numba's threads.

    All are called, some perhaps one after another. An exception in one of them ends the process: others wait for it.
    In a function that other kernels call normally, use `UNCACHED`.
    """
    kinds = (types.intp, *argument_types(args))
    function.get_call_type(typingctx, kinds, {})

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        args = _borrowed(context, builder, signature.args[2], values[2])
        body = _call_body(context, builder, function, kinds, args)
        threads, one = values[0], ir.Constant(_LONG, 1)
        data = builder.bitcast(cgutils.alloca_once_value(builder, args), _POINTER)
        pointers, counts, steps = (cgutils.alloca_once_value(builder, value) for value in (data, threads, one))
        with builder.if_else(builder.icmp_signed(">", threads, one)) as (many, single):
            with many:
                given = (builder.bitcast(part, _POINTER) for part in (body, pointers, counts, steps, data))
                # All that this thread may use: Numba would have it use no more than are named here from now on.
                usable = _call_numba(context, builder, "get_num_threads", _LONG)
                _call_numba(context, builder, "numba_parallel_for", _VOID, *given, ir.Constant(_LONG, 0), one, usable)
            with single:
                builder.call(body, [pointers, counts, steps, data])
        return context.get_dummy_value()

    return types.void(types.intp, function, args), codegen


def _borrowed(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    """A value whose arrays count no references, which all threads would do in the same words of memory.

    The caller keeps them: it waits until all threads are done.
    """
    if isinstance(kind, types.Array):
        array = context.make_array(kind)(context, builder, value=value)
        array.meminfo, array.parent = (cgutils.get_null_value(part.type) for part in (array.meminfo, array.parent))
        return array._getvalue()
    if isinstance(kind, types.BaseTuple):
        for i, part in enumerate(kind.types):
            value = builder.insert_value(value, _borrowed(context, builder, part, builder.extract_value(value, i)), i)
    return value


def _call_body(context: Any, builder: Any, function: Any, kinds: tuple[Any, ...], args: Any) -> Any:
    """What Numba's threads call, with the signature of a loop of NumPy: (pointers, counts, steps, data).

    Data are the arguments. The one pointer began there as well and is as many bytes further on as the number of the
    first thread, for steps are 1.
    """
    module = builder.module
    callee, called = declare(context, builder, function, kinds)
    kind = ir.FunctionType(_VOID, [_POINTER.as_pointer(), _LONG.as_pointer(), _LONG.as_pointer(), _POINTER])
    body = ir.Function(module, kind, module.get_unique_name("launched"))
    body.linkage = "internal"
    pointers, counts, _, data = body.args
    inside = ir.IRBuilder(body.append_basic_block())
    first = inside.sub(inside.ptrtoint(inside.load(pointers), _LONG), inside.ptrtoint(data, _LONG))
    packed = inside.load(inside.bitcast(data, args.type.as_pointer()))
    unpacked = [inside.extract_value(packed, i) for i in range(len(kinds) - 1)]
    with cgutils.for_range(inside, inside.load(counts)) as loop:
        thread = inside.add(first, loop.index)
        status, _ = context.call_conv.call_function(inside, callee, types.none, called.args, [thread, *unpacked])
        with cgutils.if_unlikely(inside, status.is_error):
            text = f"{function.dispatcher.__name__} failed in a compute thread, out of memory?\n"
            kind = ir.FunctionType(ir.IntType(32), [ir.IntType(32), _POINTER], var_arg=True)
            write = cgutils.get_or_insert_function(module, kind, "dprintf")  # not buffered: nothing would be flushed
            inside.call(write, [ir.Constant(ir.IntType(32), _STDERR), context.insert_const_string(module, text)])
            abort = cgutils.get_or_insert_function(module, ir.FunctionType(_VOID, []), "abort")
            inside.call(abort, [])
    inside.ret_void()
    return body


def _word(context: Any, builder: Any, kind: Any, progress: Any, share: Any) -> Any:
    array = context.make_array(kind)(context, builder, value=progress)
    return builder.gep(array.data, [builder.mul(share, ir.Constant(_LONG, _WORDS))])


@intrinsic
def _look(typingctx: Any, progress: Any, share: Any) -> Any:
    """A share's word, and with it what its thread has written before."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_word(context, builder, signature.args[0], *args), "acquire", 8)

    return types.int64(progress, types.intp), codegen


@intrinsic
def _replace(typingctx: Any, progress: Any, share: Any, expected: Any, value: Any) -> Any:
    """Set a share's word to a value if it is the expected one; returns whether it was."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = _word(context, builder, signature.args[0], *args[:2])
        return builder.extract_value(builder.cmpxchg(word, args[2], args[3], "acq_rel", "acquire"), 1)

    return types.boolean(progress, types.intp, types.int64, types.int64), codegen


@intrinsic
def _publish(typingctx: Any, progress: Any, share: Any, value: Any) -> Any:
    """Set a share's word; who sees it sees what this thread has written before."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store_atomic(args[2], _word(context, builder, signature.args[0], *args[:2]), "release", 8)
        return context.get_dummy_value()

    return types.void(progress, types.intp, types.int64), codegen


@intrinsic
def _pause(typingctx: Any) -> Any:
    """Tell the processor that this is a loop that waits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if platform.machine() in {"x86_64", "AMD64"}:
            kind = ir.FunctionType(_VOID, [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), codegen


@njit(**INNER)
def next_share(progress, turn, thread):  # type: ignore[no-untyped-def]
    """Take a share of a turn that nobody has taken, or wait until all are finished.

    Args:
        progress: From `make_progress`, one line for each share.
        turn: Counts from 0; each is taken once all of the one before are finished.
        thread: Which this is; its own share comes first.

    Returns:
        The share, for which `finish` must be called, or -1.
    """
    # A share's word: 2 * turn is free, one more is taken, two more is finished, which is free for the next turn. Words
    # only grow, so a thread that comes late finds nothing to do and passes through the turns that are over.
    free, finished, shares = 2 * turn, 2 * turn + 2, progress.shape[0]
    spins = 0
    while True:
        waiting = False
        for i in range(shares):
            share = thread + i if thread + i < shares else thread + i - shares
            found = _look(progress, share)
            if found == free and _replace(progress, share, free, free + 1):
                return share
            waiting |= found < finished
        if not waiting:
            return -1
        spins += shares
        _pause()
        if spins > SPINS:
            _usleep(NAP_MICROSECONDS)


@njit(**INNER)
def finish(progress, turn, share):  # type: ignore[no-untyped-def]
    """Say that a share of a turn is finished."""
    _publish(progress, share, 2 * turn + 2)
