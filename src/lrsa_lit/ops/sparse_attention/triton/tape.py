"""Replay a whole pass: what it allocates and launches, without the Python code that works this out.

A pass is a function of tensors and constants that only allocates tensors and launches kernels. Then everything but the
addresses depends on the constants and on the layouts of the tensors. The second call with the same ones is recorded,
and later calls repeat the record.

A call that does anything else with tensors, such as copying one into another layout, is never recorded. Calls whose
launches would go to Triton (replay.py) are not replayed; nor is a call in a CUDA graph, whose work tables must outlive
it (work_tables.py).

replay.py says with which versions of Triton it is on.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from lrsa_lit.ops.sparse_attention.gluon import hopper
from lrsa_lit.ops.sparse_attention.triton import replay

__all__ = ["taped"]

Results = tuple[Tensor | None, ...]
Pass = TypeVar("Pass", bound=Callable[..., Results])
"""``function(tensors, *constants)``; the last tensor may be None."""

_ALLOCATE = ("aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty")

_STREAM = object()
"""In the place of the stream, among the arguments of a recorded launch."""

_hooks = operator.attrgetter("pre_run_hooks")


def taped(function: Pass) -> Pass:
    """A decorator for passes. Triton's interpreter compiles no kernels, so there they stay as they are."""
    return function if knobs.runtime.interpret else cast("Pass", functools.wraps(function)(_Taped(function)))


class _Taped:
    """A pass, the number of its calls without a tape, and its tapes."""

    def __init__(self, function: Callable[..., Results]) -> None:
        self._function = function
        self._calls: dict[Hashable, int] = {}
        self._tapes: dict[Hashable, _Tape] = {}

    def __call__(self, tensors: Sequence[Tensor], *constants: Hashable) -> Results:
        addresses = _addresses(tensors)
        if addresses is None:
            return self._function(tensors, *constants)
        active = driver.active
        device = active.get_current_device()
        # Benchmarks and tests choose between the plain kernels and those for Hopper by the number of rows.
        key = (
            id(active), device, hopper.ENOUGH, constants,
            *[(tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in tensors],
        )  # fmt: skip
        tape = self._tapes.get(key)
        if tape is not None and not any(map(_hooks, tape.kernels)):
            return tape.play(tensors, addresses, active.get_current_stream(device))
        # A tensor that is given twice could not be told from two tensors.
        if len(set(map(id, tensors))) < len(tensors) or not self._is_second(key):
            return self._function(tensors, *constants)
        with _Recorder(tensors) as recorder:
            results = self._function(tensors, *constants)
        tape = recorder.tape(results, active)
        if tape is not None:
            self._tapes[key] = tape
        return results

    def _is_second(self, key: Hashable) -> bool:
        """Count a call. The first one may compile kernels and build work tables, so it is not recorded."""
        if key not in self._calls and len(self._calls) >= replay.MOST_PLANS:
            self._calls.clear()
            self._tapes.clear()
        self._calls[key] = self._calls.get(key, 0) + 1
        return self._calls[key] == 2


def _addresses(tensors: Sequence[Tensor]) -> list[int] | None:
    """The addresses of the tensors; None if a call with them is not replayed."""
    if torch.compiler.is_compiling() or not (replay.ENABLED and replay.OF_PASSES) or replay.is_watched():
        return None
    # A pass within a recorded one is a part of its record.
    if tensors[-1] is None or replay.thread.listener is not None:
        return None
    if tensors[0].is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    addresses = list(map(Tensor.data_ptr, tensors))
    # 16 divides a union only if it divides each address.
    return None if functools.reduce(operator.or_, addresses) % 16 else addresses


class _Tape(NamedTuple):
    """What a call does. Launches pick their arguments from a pool: stream, addresses, descriptors, constants.

    Attributes:
        allocations: functions that allocate the tensors besides the given ones.
        descriptors: the type and the attributes of each, and the index of its tensor.
        constants: the arguments that are the same for all calls.
        launches: a launcher, and what picks its arguments.
        results: the indices of the returned tensors; None for those that are None.
        kernels: the launched kernels.
        kept: what must outlive the tape, because it has their addresses: driver, compiled kernels, work tables.
    """

    allocations: list[Callable[[], Tensor]]
    descriptors: list[tuple[type[Any], dict[str, Any], int]]
    constants: list[Any]
    launches: list[tuple[Callable[..., None], Callable[[Sequence[Any]], tuple[Any, ...]]]]
    results: list[int | None]
    kernels: list[JITFunction]
    kept: list[Any]

    def play(self, given: Sequence[Tensor], addresses: list[int], stream: int) -> Results:
        """Do it again with other tensors of the same layouts."""
        made = [allocate() for allocate in self.allocations]
        tensors = [*given, *made]
        descriptors = []
        for kind, attributes, index in self.descriptors:
            descriptor = object.__new__(kind)
            descriptor.__dict__ = {**attributes, "base": tensors[index]}
            descriptors.append(descriptor)
        pool = [stream, *addresses, *map(Tensor.data_ptr, made), *descriptors, *self.constants]
        for run, pick in self.launches:
            run(*pick(pool))
        return tuple([None if index is None else tensors[index] for index in self.results])


class _Recorder(TorchDispatchMode):
    """Notes what a call allocates and launches."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__()
        self._given = len(given)
        self._tensors = list(given)
        # By id; aliases have the index of their tensor, and live as long as this, so that no two have the same id.
        self._index_of = {id(tensor): index for index, tensor in enumerate(given)}
        self._aliases: list[Tensor] = []
        self._launches: list[replay.Launch | None] = []
        self._is_repeatable = True

    def __enter__(self) -> _Recorder:
        """Listen to this thread."""
        replay.thread.listener = self._launches.append
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop listening."""
        super().__exit__(*error)
        replay.thread.listener = None

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator of PyTorch."""
        result = function(*args, **(kwargs or {}))
        name = function._schema.name
        if name in _ALLOCATE:
            self._index_of[id(result)] = len(self._tensors)
            self._tensors.append(result)
        elif name == "aten::detach" and id(args[0]) in self._index_of:
            # torch.empty returns an alias of what it has allocated.
            self._index_of[id(result)] = self._index_of[id(args[0])]
            self._aliases.append(result)
        else:
            self._is_repeatable = False
        return result

    def tape(self, results: Results, active: Any) -> _Tape | None:
        """The tape of the call; None if the call did something that a tape cannot repeat."""
        launches = [launch for launch in self._launches if launch is not None]
        index_of = self._index_of
        arguments = [argument for launch in launches for argument in launch.arguments]
        read = [getattr(argument, "base", argument) for argument in arguments]
        tables = [each for each in read if isinstance(each, Tensor) and id(each) not in index_of]
        if (
            len(launches) < len(self._launches)
            or not self._is_repeatable
            or set(map(_memory, self._tensors)) & set(map(_memory, tables)) - {0}
            or any(result is not None and id(result) not in index_of for result in results)
        ):
            return None
        descriptors = [argument for argument in arguments if id(getattr(argument, "base", None)) in index_of]
        place_of = {id(_STREAM): 0} | {each: 1 + index for each, index in index_of.items()}
        place_of |= {id(each): 1 + len(self._tensors) + index for index, each in enumerate(descriptors)}
        constants: list[Any] = []
        before = 1 + len(self._tensors) + len(descriptors)

        def place(argument: Any) -> int:
            if id(argument) in place_of:
                return place_of[id(argument)]
            constants.append(argument.data_ptr() if isinstance(argument, Tensor) else argument)
            return before + len(constants) - 1

        return _Tape(
            [_allocation_of(tensor) for tensor in self._tensors[self._given :]],
            [(type(each), vars(each) | {"base": None}, index_of[id(each.base)]) for each in descriptors],
            constants,
            [
                (plan.run, operator.itemgetter(*map(place, plan.line(grid, _STREAM, values))))
                for _, plan, grid, values in launches
            ],
            [None if result is None else index_of[id(result)] for result in results],
            [launch.kernel for launch in launches],
            [active, *[launch.plan for launch in launches], *tables],
        )


def _memory(tensor: Tensor) -> int:
    """The address of the memory of a tensor and of all views of it; 0 if it has none."""
    return tensor.untyped_storage().data_ptr()


def _allocation_of(tensor: Tensor) -> Callable[[], Tensor]:
    """A function that allocates a tensor of the same layout."""
    return functools.partial(
        torch.empty_strided, tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )
