"""Stages of a pipeline that take a set time: the CPU's programs, each followed by a sleep on its device.

Virtual devices share the cores of one machine, so that real products would slow each other down and say nothing of a
pipeline; sleeping stages keep each other waiting just as devices of their own would. The sleep must run when its
device comes to it while the host goes on: a host callback of JAX will not do, since programs that hold one are
dispatched synchronously. So it is a foreign function, by XLA's own C interface (``xla/ffi/api/c_api.h`` below
`jax.ffi.include_dir()`), which ctypes can answer without a compiler.
"""

import ctypes
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sarathi_jax.runner import Runner

_TARGET = "sarathi_jax_sleep"
_METADATA_EXTENSION = 1
_EXECUTE = 3
# Of the structures below; XLA takes handlers of older versions.
_API_VERSION = (0, 4)


class _Extension(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_size_t), ("type", ctypes.c_int), ("next", ctypes.c_void_p)]


class _Metadata(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("version_struct_size", ctypes.c_size_t),
        ("version_extension", ctypes.c_void_p),
        ("major_version", ctypes.c_int),
        ("minor_version", ctypes.c_int),
        ("traits", ctypes.c_uint32),
        ("state_type_id", ctypes.c_int64),
    ]


class _MetadataExtension(ctypes.Structure):
    _fields_ = [("base", _Extension), ("metadata", ctypes.POINTER(_Metadata))]


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        ("data", ctypes.POINTER(ctypes.c_double)),
        ("rank", ctypes.c_int64),
        ("dims", ctypes.POINTER(ctypes.c_int64)),
    ]


class _Buffers(ctypes.Structure):
    """Arguments, or results."""

    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("types", ctypes.POINTER(ctypes.c_int)),
        ("buffers", ctypes.POINTER(ctypes.POINTER(_Buffer))),
    ]


class _CallFrame(ctypes.Structure):
    """Its beginning, as far as it is read here."""

    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("extension", ctypes.POINTER(_MetadataExtension)),
        ("api", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
        ("stage", ctypes.c_int),
        ("arguments", _Buffers),
        ("results", _Buffers),
    ]


@ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_CallFrame))
def _sleep(pointer: Any) -> None:
    """Sleeps until some seconds after a moment; all numbers are float64, moments of `time.perf_counter`.

    Arguments are the seconds and the moment, 0 for now; results that moment and the end.
    """
    frame = pointer.contents
    if frame.extension and frame.extension.contents.base.type == _METADATA_EXTENSION:
        metadata = frame.extension.contents.metadata.contents
        metadata.major_version, metadata.minor_version = _API_VERSION
        metadata.traits, metadata.state_type_id = 0, 0
    elif frame.stage == _EXECUTE:
        begin_s = frame.arguments.buffers[1].contents.data[0] or time.perf_counter()
        time.sleep(max(0, begin_s + frame.arguments.buffers[0].contents.data[0] - time.perf_counter()))
        times = frame.results.buffers[0].contents.data
        times[0], times[1] = begin_s, time.perf_counter()


@functools.cache
def _register() -> None:
    jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(_sleep), platform="cpu")


def _sleep_call(seconds: float, begin: jax.Array, waits_for: jax.Array) -> jax.Array:
    """The call inside a traced function: begin u32[2], the bits of a float64; result u32[4], of two."""
    # XLA runs whatever it counts few operations in at once, in the thread that dispatches it: this counts as many.
    operations = jnp.sum(jnp.arange(4096, dtype=jnp.uint32) * waits_for[0])
    bits = jnp.asarray(np.array([seconds]).view(np.uint32))
    return jax.ffi.ffi_call(_TARGET, jax.ShapeDtypeStruct((4,), jnp.uint32))(bits, begin, operations)


@dataclasses.dataclass(frozen=True)
class Span:
    """When a stage ran a micro-batch, by `time.perf_counter`.

    Attributes:
      stage, step: of the pipeline, and of the micro-batches since the spans were taken; from 0.
      begin_s: what it needs was there and the micro-batch before it done.
      end_s: its result was there.
    """

    stage: int
    step: int
    begin_s: float
    end_s: float


class SlowStages:
    """Slows the programs of a runner, whose stages have one virtual device each, for as long as the runner lives.

    A micro-batch takes the set time from when its inputs are there and the one before it is done; its real program,
    which must be quicker, runs meanwhile.

    Args:
      runner: its programs are replaced.
      seconds_of: time of a micro-batch in a stage, by its bucket.
    """

    def __init__(self, runner: Runner, seconds_of: Callable[[int], float]):
        _register()
        stages = [runner.stages[i] for i in range(len(runner.stages))]
        self._times: list[list[jax.Array]] = [[] for _ in stages]
        # Of each stage the times of its newest micro-batch, for which the next one waits.
        self._newest = [jax.device_put(np.zeros(4, np.uint32), stage.everywhere) for stage in stages]
        for i, stage in enumerate(stages):
            for bucket, program in stage.programs.items():
                stage.programs[bucket] = self._slowed(i, program, seconds_of(bucket))

    def take_spans(self) -> list[Span]:
        """Waits for the micro-batches under way; the spans of all since the last call."""
        spans = []
        for i, stage_times in enumerate(self._times):
            for step, times in enumerate(stage_times):
                begin_s, end_s = np.asarray(times).view(np.float64).tolist()
                spans.append(Span(i, step, begin_s, end_s))
            stage_times.clear()
        return spans

    def _slowed(self, stage: int, program: Any, seconds: float) -> Any:
        def start(before: jax.Array, inputs: tuple[jax.Array | None, ...]) -> jax.Array:
            return _sleep_call(0, jnp.zeros(2, jnp.uint32), before)

        def finish(started: jax.Array, output: Any) -> tuple[jax.Array, Any]:
            return lax.optimization_barrier((_sleep_call(seconds, started[:2], started), output))

        newest, ((_, _, *inputs, _, _), _) = self._newest[stage], program.in_avals
        _, _, output = program.out_info
        starts = jax.jit(start, keep_unused=True).lower(newest, tuple(inputs)).compile()
        finishes = jax.jit(finish, donate_argnums=1).lower(newest, output).compile()

        def run(params: Any, cache: Any, history: Any, hidden: Any, *rest: Any) -> tuple[Any, Any, Any]:
            started = starts(self._newest[stage], (history, hidden))
            cache, history, output = program(params, cache, history, hidden, *rest)
            self._newest[stage], output = finishes(started, output)
            self._times[stage].append(self._newest[stage])
            return cache, history, output

        return run
