"""Launch a kernel again without Triton's binder, which takes most of a launch's host time.

At each launch, Triton looks at every argument to find the compiled kernel: a pointer or an integer that 16 divides, or
an integer 1, may lead to another one. A replayed kernel remembers the compiled kernel by all that this choice depends
on, and passes later launches of the same kind to the compiled kernel's own launcher.

Launches that it is not sure of go to Triton: in the interpreter, with other backends, while hooks or debugging options
are set, with a misaligned pointer, and with arguments of other types.

It is on with versions of Triton with which it has passed its tests on a GPU; ``LRSA_REPLAY_LAUNCHES`` overrides that.
"""

from __future__ import annotations

import functools
import operator
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from lrsa_lit.errors import UserError
from lrsa_lit.ops.sparse_attention.triton.host_functions import triton_is_among

__all__ = [
    "PASSES_RAN_WITH",
    "RAN_WITH",
    "REPLAYS_WITH",
    "VARIABLE",
    "Launch",
    "Replayed",
    "is_watched",
    "replayed",
    "thread",
]

REPLAYS_WITH = ("3.6", "3.7", "3.8", "3.9")
"""Versions of Triton whose launchers take the arguments that :class:`Replayed` passes."""

RAN_WITH = ("3.6", "3.9")
"""Those of them with which replays have passed their tests on a GPU (``make test-gpu``), and are on by default."""

PASSES_RAN_WITH = ("3.6",)
"""Those with which replays of whole passes (tape.py) have passed them too."""

VARIABLE = "LRSA_REPLAY_LAUNCHES"
"""The environment variable that switches all replays off (0), or on for launches (1) or whole passes (passes)."""


_PASSES = "passes"


def _asked() -> str:
    value = os.environ.get(VARIABLE) or _default()
    if value not in ("0", "1", _PASSES):
        raise UserError(VARIABLE, value, f"0, 1 or {_PASSES}")
    if value != "0" and not triton_is_among(REPLAYS_WITH):
        known = f"is for triton {', '.join(REPLAYS_WITH)}; {triton.__version__} is installed"
        raise UserError(VARIABLE, value, "0", reason=known)
    return value


def _default() -> str:
    if triton_is_among(PASSES_RAN_WITH):
        return _PASSES
    return "1" if triton_is_among(RAN_WITH) else "0"


ENABLED = _asked() != "0"
"""Whether kernels are replayed; read at each launch."""

OF_PASSES = _asked() == _PASSES
"""Whether whole passes are replayed too (tape.py); read at each call."""

MOST_PLANS = 512
"""The number of launches that a kernel remembers. With more, it forgets all: lengths may differ at each step."""

_dtype, _is_cuda = operator.attrgetter("dtype"), operator.attrgetter("is_cuda")


def replayed(kernel: Any) -> Any:
    """A decorator above ``triton.jit`` or ``gluon.jit``; kernels of Triton's interpreter stay as they are."""
    return Replayed(kernel) if isinstance(kernel, JITFunction) else kernel


class Replayed:
    """A kernel that is launched like any other: ``kernel[grid](*arguments, **options)``.

    Compile-time arguments must follow all others, have no defaults, and be passed by keyword; the others by position.

    Attributes:
        kernel: the kernel itself, a ``JITFunction``.
    """

    def __init__(self, kernel: JITFunction) -> None:
        self.kernel = kernel
        self._kinds: dict[tuple[type, ...], _Kind | None] = {}

    def __getitem__(self, grid: Sequence[int]) -> Callable[..., None]:
        """A function that launches the kernel on a grid of one to three dimensions."""
        return functools.partial(self._launch, grid) if ENABLED else self.kernel[grid]

    def _launch(self, grid: Sequence[int], *arguments: Any, **options: Any) -> None:
        types = tuple(map(type, arguments))
        try:
            kind = self._kinds[types]
        except KeyError:
            kind = self._kinds[types] = _kind_of(self.kernel, types)
        if kind is None or self.kernel.pre_run_hooks or is_watched():
            self._bind(grid, arguments, options)
            return
        tensors = kind.pointers(arguments)
        addresses = list(map(Tensor.data_ptr, tensors))
        # All together, because 16 divides a union only if it divides each address. Integers that Triton does not
        # specialise are passed as 32 bits if they fit; a negative one makes their union negative.
        address = functools.reduce(operator.or_, addresses, 0)
        integer = functools.reduce(operator.or_, kind.unspecialised(arguments), 0)
        if address % 16 or not 0 <= integer < 1 << 31:
            self._bind(grid, arguments, options)
            return
        active = driver.active
        device = active.get_current_device()
        # Triton's launcher refuses tensors that are not on a GPU, but cannot tell this from an address.
        key = (
            id(active), device, *kind.specialised(arguments), *options, *options.values(),
            *map(_dtype, tensors), *map(_is_cuda, tensors),
            *[
                (descriptor.base.dtype, *descriptor.block_shape, getattr(descriptor, "layout", None))
                for descriptor in kind.descriptors(arguments)
            ],
        )  # fmt: skip
        plan = kind.plans.get(key)
        if plan is None:
            self._remember(kind, key, self._bind(grid, arguments, options), options)
            return
        values = list(arguments)
        for place, address in zip(kind.places, addresses, strict=True):
            values[place] = address
        plan.run(*plan.line(grid, active.get_current_stream(device), values))
        if thread.listener is not None:
            thread.listener(Launch(self.kernel, plan, grid, arguments))

    def _bind(self, grid: Sequence[int], arguments: Sequence[Any], options: dict[str, Any]) -> Any:
        """Let Triton launch it; returns the compiled kernel."""
        if thread.listener is not None:
            thread.listener(None)
        return self.kernel[grid](*arguments, **options)

    def _remember(self, kind: _Kind, key: tuple[Any, ...], compiled: Any, options: dict[str, Any]) -> None:
        # A hook or a test may keep Triton from compiling, or launching.
        if not isinstance(compiled, CompiledKernel) or compiled.metadata.target.backend != "cuda":
            return
        if len(kind.plans) >= MOST_PLANS:
            kind.plans.clear()
        constants = [options[name] for name in kind.constants]
        kind.plans[key] = _Plan(compiled, compiled.run, tuple(constants))


class _Plan(NamedTuple):
    """A compiled kernel, its launcher, and its compile-time arguments, which the launcher skips."""

    kernel: CompiledKernel
    run: Callable[..., None]
    constants: tuple[Any, ...]

    def line(self, grid: Sequence[int], stream: Any, values: Sequence[Any]) -> tuple[Any, ...]:
        """All arguments of the launcher."""
        x, y, z = (*grid, 1, 1)[:3]
        compiled = self.kernel
        # Without hooks, nobody reads the description of the launch.
        return (
            x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *values, *self.constants
        )  # fmt: skip


class Launch(NamedTuple):
    """A replayed launch of a kernel."""

    kernel: JITFunction
    plan: _Plan
    grid: Sequence[int]
    arguments: Sequence[Any]


class _Thread(threading.local):
    """What is called after each launch of this thread: with the launch, or with None if Triton launches it."""

    listener: Callable[[Launch | None], None] | None = None


thread = _Thread()


@dataclass
class _Kind:
    """Launches with the same types of arguments: which of them are what, and the plans of these launches."""

    places: tuple[int, ...]
    pointers: Callable[[Sequence[Any]], tuple[Tensor, ...]]
    descriptors: Callable[[Sequence[Any]], tuple[Any, ...]]
    specialised: Callable[[Sequence[Any]], tuple[int, ...]]
    unspecialised: Callable[[Sequence[Any]], tuple[int, ...]]
    constants: tuple[str, ...]
    plans: dict[tuple[Any, ...], _Plan] = field(default_factory=dict, init=False)


def _kind_of(kernel: JITFunction, types: Sequence[type]) -> _Kind | None:
    """The kind of launches with arguments of some types; None if Triton must launch them."""
    given, constants = kernel.params[: len(types)], kernel.params[len(types) :]
    if any(param.is_constexpr or param.annotation for param in given):
        return None
    if not all(param.is_constexpr and not param.has_default for param in constants):
        return None
    places: dict[str, list[int]] = {"pointers": [], "descriptors": [], "specialised": [], "unspecialised": []}
    for place, (param, kind) in enumerate(zip(given, types, strict=True)):
        if issubclass(kind, Tensor) and not param.do_not_specialize:
            places["pointers"].append(place)
        elif kind.__name__ == "TensorDescriptor":
            # Triton's or Gluon's.
            places["descriptors"].append(place)
        elif kind is int:
            places["unspecialised" if param.do_not_specialize else "specialised"].append(place)
        elif kind not in (float, type(None)):
            return None
    return _Kind(
        tuple(places["pointers"]),
        **{name: _getter(found) for name, found in places.items()},
        constants=tuple(param.name for param in constants),
    )


def _getter(places: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """A function that returns a tuple of the items in these places."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    return lambda items: tuple([items[place] for place in places])


def is_watched() -> bool:
    """Whether something wants to see launches, or to compile other kernels, for instance a profiler or a debugger."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        getattr(enter, "calls", enter)
        or getattr(leave, "calls", leave)
        or runtime.add_stages_inspection_hook
        or runtime.debug
        or knobs.compilation.instrumentation_mode
    )
