"""A played tape allocates, launches and returns what the pass itself would, on a driver for GPUs that are not there."""

import ast
import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.triton.test_replay import Bench
from triton import knobs
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from lrsa_lit.ops import sparse_attention
from lrsa_lit.ops.sparse_attention.gluon import hopper
from lrsa_lit.ops.sparse_attention.triton import host_functions, replay, tape

MEMORY = torch.zeros(4096)
TABLE = torch.arange(8)


class Passes:
    """The same pass, taped and ordinary; how often the code of the taped one ran."""

    def __init__(self, body=None):
        self.bench, self.ran = Bench(), 0
        kernels = {"taped": self.bench.replayed, "ordinary": self.bench.kernels["ordinary"]}
        self.launches = {"taped": self.bench.launches["replayed"], "ordinary": self.bench.launches["ordinary"]}
        body = body or attend

        def function(tensors, *constants):
            self.ran += 1
            return body(kernels["taped"], tensors, *constants)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(knobs.runtime, "interpret", False)
            self.taped = tape.taped(function)
        self.ordinary = lambda tensors, *constants: body(kernels["ordinary"], tensors, *constants)

    def call(self, tensors, *constants):
        """Call both; both must launch the same, and return tensors of the same layouts."""
        found = []
        for name in ("taped", "ordinary"):
            self.launches[name].clear()
            results = getattr(self, name)(tensors, *constants)
            names = {0: "none", TABLE.data_ptr(): "table"}
            names |= {tensor.data_ptr(): f"given {index}" for index, tensor in enumerate(tensors)}
            made = {index: result for index, result in enumerate(results) if result is not None}
            names |= {result.data_ptr(): f"result {index}" for index, result in made.items()}
            launched = [(*launch[:3], [named(each, names) for each in launch[3]]) for launch in self.launches[name]]
            layouts = [
                None if each is None else (each.shape, each.stride(), each.dtype, each.device, each.requires_grad)
                for each in results
            ]
            found.append((launched, layouts))
        assert found[0] == found[1]
        return found[0]


def named(argument, names):
    """An argument of a launch, with a name for an address; memory that the pass has allocated and freed is "room"."""
    if isinstance(argument, TensorDescriptor):
        attributes = vars(argument) | {"base": names[argument.base.data_ptr()]}
        return sorted((name, str(value)) for name, value in attributes.items())
    if isinstance(argument, int) and argument > 1 << 40:
        return names.get(argument, "room")
    return argument


def attend(kernel, tensors, scale=0.5, rows=16):
    """A pass of three launches: descriptors, intermediate memory, a work table, nothing, and both kinds of results."""
    first, second = tensors
    room, output = second.new_empty((3, 4), dtype=torch.float64), torch.empty_like(first)
    size = torch.empty(first.shape[1], dtype=torch.int32, device=first.device)
    (block,) = host_functions.row_descriptors(rows, first.shape[3], first)
    kernel[(3,)](block, first, room, first.stride(1), first.shape[0], scale, rows=rows)
    kernel[(5, 6)](None, room, TABLE, second.stride(1), 7, scale, rows=rows)
    (block,) = host_functions.row_descriptors(rows, first.shape[3], output)
    kernel[(7, 8, 9)](block, second, size, second.stride(2), 7, None, rows=rows, num_warps=8)
    return output, None, size, second


def tensors(offset=0, shape=(1, 2, 4, 16), heads_last=False, cut=0, dtype=torch.float32, grad=False, seed=0):
    """Two tensors (B, H, T - cut, D) somewhere in memory; ``offset`` shifts the first by elements."""
    batch, heads, length, dim = shape
    count = batch * heads * length * dim
    made = []
    for start in (512 * seed + offset, 512 * (seed + 1)):
        flat = MEMORY.view(dtype)[start + -MEMORY.data_ptr() // dtype.itemsize % 64 :][:count]
        rows = flat.view(batch, length, heads, dim).transpose(1, 2) if heads_last else flat.view(shape)
        made.append(rows[:, :, : length - cut].detach().requires_grad_(grad))
    return made


@pytest.fixture(autouse=True)
def _switched_on(monkeypatch):
    monkeypatch.setattr(replay, "ENABLED", True)
    monkeypatch.setattr(replay, "OF_PASSES", True)


@pytest.fixture
def passes(monkeypatch):
    return installed(Passes(), monkeypatch)


def installed(passes, patch):
    patch.setattr(driver, "_active", passes.bench.driver)
    return passes


def test_the_third_call_is_played_with_other_tensors(passes):
    expected = passes.call(tensors())
    assert passes.call(tensors(seed=1)) == expected
    for seed in range(2, 5):
        assert passes.call(tensors(seed=seed)) == expected
    assert passes.ran == 2
    assert len(expected[0]) == 3


def test_results_are_new_memory(passes):
    outputs = [passes.taped(tensors())[0] for _ in range(5)]
    assert len({output.data_ptr() for output in outputs}) == 5


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"offset": 1}, id="alignment"),
        pytest.param({"heads_last": True}, id="strides"),
        pytest.param({"cut": 1}, id="length"),
        pytest.param({"shape": (1, 0, 4, 16)}, id="nothing"),
        pytest.param({"dtype": torch.float16}, id="dtype"),
        pytest.param({"grad": True}, id="gradients"),
    ],
)
def test_calls_with_other_tensors_are_never_confused(changes, monkeypatch):
    for first, second in (({}, changes), (changes, {})):
        passes = installed(Passes(), monkeypatch)
        with torch.no_grad():
            for layout in (first, first, first, second, second, second, first):
                passes.call(tensors(**layout))


def test_calls_with_other_constants_and_devices_are_never_confused(passes):
    seen = []
    for _ in range(4):
        for device, stream, constants in ((0, 7, ()), (0, 7, (0.25,)), (0, 7, (0.25, 32)), (1, 7, ()), (0, 8, ())):
            passes.bench.driver.device, passes.bench.driver.stream = device, stream
            seen.append(str(passes.call(tensors(), *constants)))
    assert len(set(seen)) == 5
    assert passes.ran == 8


def test_another_choice_of_kernels_is_another_call(passes, monkeypatch):
    for enough, ran in ((1, 2), (2, 4), (1, 4)):
        monkeypatch.setattr(hopper, "ENOUGH", enough)
        for _ in range(3):
            passes.call(tensors())
        assert passes.ran == ran


given_tensors = st.builds(
    tensors,
    offset=st.sampled_from([0, 1, 4]),
    shape=st.sampled_from([(1, 2, 4, 16), (2, 1, 4, 16), (1, 2, 4, 8)]),
    heads_last=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    seed=st.integers(0, 2),
)


@given(st.lists(st.tuples(given_tensors, st.sampled_from([0.5, 0.25]), st.integers(0, 1)), max_size=8))
@settings(max_examples=30)
def test_any_calls_in_any_order_launch_what_triton_launches(calls):
    with pytest.MonkeyPatch.context() as patch:
        passes = installed(Passes(), patch)
        for each, scale, device in calls * 3:
            passes.bench.driver.device = device
            passes.call(each, scale)


def test_one_tensor_given_twice_is_not_taken_for_two(passes):
    first, second = tensors()
    for _ in range(3):
        passes.call((first, first))
    for _ in range(4):
        passes.call((first, second))
        passes.call((first, first))


def test_a_call_without_its_last_tensor_is_not_taped(monkeypatch):
    passes = installed(Passes(lambda kernel, given, *_: (torch.empty_like(given[0]),)), monkeypatch)
    for _ in range(4):
        passes.taped((tensors()[0], None))
    assert passes.ran == 4


def copies(kernel, given, *_):
    output = given[0].transpose(1, 2).contiguous()
    kernel[(3,)](None, output, output, 16, 7, 0.5, rows=16)
    return (output,)


def fills(kernel, given, *_):
    output = torch.empty_like(given[0]).fill_(1)
    kernel[(3,)](None, given[1], output, 16, 7, 0.5, rows=16)
    return (output,)


def hides_an_alias(kernel, given, *_):
    output = torch.empty_like(given[0])
    kernel[(3,)](None, torch.nn.Parameter(given[1], requires_grad=False), output, 16, 7, 0.5, rows=16)
    return (output,)


def is_left_to_triton(kernel, given, *_):
    output = torch.empty_like(given[0])
    kernel[(3,)](None, given[1], output, 16, 1 << 31, 0.5, rows=16)
    return (output,)


def returns_another_tensor(kernel, given, *_):
    kernel[(3,)](None, *given, 16, 7, 0.5, rows=16)
    return (TABLE,)


@pytest.mark.parametrize("body", [copies, fills, hides_an_alias, is_left_to_triton, returns_another_tensor])
def test_what_a_tape_cannot_repeat_is_not_taped(body, monkeypatch):
    passes = installed(Passes(body), monkeypatch)
    for seed in range(5):
        passes.call(tensors(seed=seed))
    assert passes.ran == 5


def test_hooks_debuggers_and_the_switch_stop_tapes(passes, monkeypatch):
    seen = []
    for _ in range(3):
        passes.call(tensors())
    with monkeypatch.context() as patch:
        patch.setattr(knobs.runtime, "launch_enter_hook", seen.append)
        passes.call(tensors())
    assert len(seen) == 6
    with monkeypatch.context() as patch:
        patch.setattr(knobs.runtime, "debug", True)
        passes.call(tensors())
    for switch in ("ENABLED", "OF_PASSES"):
        with monkeypatch.context() as patch:
            patch.setattr(replay, switch, False)
            passes.call(tensors())
    assert passes.ran == 6
    passes.call(tensors())
    assert passes.ran == 6
    passes.bench.kernels["replayed"].add_pre_run_hook(lambda *arguments, **options: seen.append(arguments))
    passes.call(tensors())
    assert (len(seen), passes.ran) == (9, 7)


def test_an_error_while_recording_leaves_the_next_calls_alone(monkeypatch):
    errors = [None, ZeroDivisionError]

    def fails(*_):
        if error := errors.pop(0):
            raise error
        return (None,)

    failing = installed(Passes(fails), monkeypatch)
    failing.taped(tensors())
    with pytest.raises(ZeroDivisionError):
        failing.taped(tensors())
    passes = installed(Passes(), monkeypatch)
    for _ in range(4):
        passes.call(tensors())
    assert passes.ran == 2


def follows_an_alias(kernel, given, *_):
    output = torch.empty_like(given[0])
    kernel[(3,)](None, given[1].detach(), output, 16, 7, 0.5, rows=16)
    return (output,)


def test_an_alias_has_the_address_of_its_tensor(monkeypatch):
    passes = installed(Passes(follows_an_alias), monkeypatch)
    for seed in range(5):
        passes.call(tensors(seed=seed))
    assert passes.ran == 2


def test_a_pass_within_a_pass_is_a_part_of_its_tape(monkeypatch):
    inner = Passes()
    outer = installed(Passes(lambda kernel, given, *_: inner.taped(given)), monkeypatch)
    monkeypatch.setattr(driver, "_active", inner.bench.driver)
    for _ in range(3):
        inner.call(tensors())
    launched = inner.launches["taped"]
    for _ in range(4):
        launched.clear()
        outer.taped(tensors())
        assert len(launched) == 3
    assert outer.ran == 2


def test_memory_of_tapes_is_limited(passes, monkeypatch):
    monkeypatch.setattr(replay, "MOST_PLANS", 3)
    for scale in (0.0, 1.0, 2.0, 3.0, 0.0):
        for _ in range(3):
            passes.call(tensors(), scale)
    # The first call is forgotten, and recorded again.
    assert passes.ran == 10


def test_a_work_table_lives_as_long_as_its_address_is_used(monkeypatch):
    tables = [torch.arange(8)]

    def looks_up(kernel, given, *_):
        kernel[(3,)](None, tables[0], given[1], 16, 7, 0.5, rows=16)
        return (given[0],)

    passes = installed(Passes(looks_up), monkeypatch)
    for _ in range(3):
        passes.taped(tensors())
    table = weakref.ref(tables.pop())
    gc.collect()
    passes.taped(tensors())
    assert table() is not None
    assert passes.launches["taped"][-1][3][1] == table().data_ptr()


def test_every_kernel_that_is_launched_is_replayed():
    """Launches of others would not be heard, and so be missing in a tape."""
    launched = 0
    for path in Path(sparse_attention.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text())
        kernels = {
            each.name
            for each in ast.walk(tree)
            if isinstance(each, ast.FunctionDef) and "replayed" in map(ast.unparse, each.decorator_list)
        }
        for call in ast.walk(tree):
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Subscript)):
                continue
            name = ast.unparse(call.func.value)
            if name.endswith("_kernel"):
                assert name in kernels
                launched += 1
    assert launched >= 10


@pytest.mark.slow
def test_the_operator_is_played_and_launches_what_it_launches_ordinarily():
    tests = Path(__file__).parents[2]
    paths = os.pathsep.join([*map(str, (tests, tests.parent / "benchmarks")), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("operator_launches.py")],
        env=os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": paths},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name, (calls, played) in json.loads(done.stdout).items():
        # The selection, the attention and its gradient, of the last call at least.
        assert played >= 3, name
        assert len(calls[0]) >= 2, name
        assert all(launched == calls[0] for launched in calls[1:]), name
