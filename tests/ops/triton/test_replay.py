"""A replayed kernel launches what Triton would have launched: on the CPU with a stand-in driver, and on a GPU."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from helpers import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from lrsa_lit.ops.sparse_attention import Rule, sparse_attention
from lrsa_lit.ops.sparse_attention.gluon import hopper
from lrsa_lit.ops.sparse_attention.triton import host_functions, replay


def kernel(d_block, p_in, p_out, stride, size, scale, rows: "tl.constexpr"):  # noqa: F821
    """Never compiled."""


class Compiled(CompiledKernel):
    """In the place of a compiled kernel: Triton's key of it is its name, and it notes its launches."""

    def __init__(self, key, launches):
        self.function, self.packed_metadata, self.src = key, (), None
        self.metadata = SimpleNamespace(target=GPUTarget("cuda", 90, 32))
        self.module, self.name, self.hash, self.launches = 1, "kernel", key, launches

    def __del__(self):
        pass

    def _init_handles(self):
        pass

    @property
    def run(self):
        return self._note

    def _note(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments):
        if enter is not None:
            enter(launch_metadata)
        addresses = [each.data_ptr() if isinstance(each, torch.Tensor) else each for each in arguments]
        self.launches.append(((x, y, z), stream, function, addresses))


class Device:
    """A driver for GPUs that are not there."""

    def __init__(self):
        self.device, self.stream = 0, 7

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return self.stream


class Bench:
    """The same kernel, replayed and ordinary; what each has launched, and how often Triton has bound arguments."""

    def __init__(self):
        self.driver, self.bound = Device(), 0
        self.launches = {"replayed": [], "ordinary": []}
        self.kernels = {name: self._made(launches) for name, launches in self.launches.items()}
        self.replayed = replay.Replayed(self.kernels["replayed"])

    def _made(self, launches):
        made = JITFunction(kernel, do_not_specialize=["size"])

        def compiled(key, signature, device, constexprs, options, attrs, warmup):
            cache = made.device_caches[device][0]
            cache[key] = Compiled(f"{device} {key}", launches)
            return cache[key]

        made._do_compile = compiled
        run = made.run

        def counted(*arguments, **options):
            self.bound += launches is self.launches["replayed"]
            return run(*arguments, **options)

        made.run = counted
        return made

    def launch(self, *arguments, grid=(3,), rows=16, **options):
        self.replayed[grid](*arguments, rows=rows, **options)
        self.kernels["ordinary"][grid](*arguments, rows=rows, **options)
        assert self.launches["replayed"] == self.launches["ordinary"]


@pytest.fixture(autouse=True)
def _switched_on(monkeypatch):
    monkeypatch.setattr(replay, "ENABLED", True)


@pytest.fixture
def bench(monkeypatch):
    made = Bench()
    monkeypatch.setattr(driver, "_active", made.driver)
    return made


MEMORY = torch.zeros(64, dtype=torch.float32)
ALIGNED = MEMORY[-MEMORY.data_ptr() // 4 % 4 :]


def arguments(offset=0, stride=32, size=100, scale=0.5, block=None, dtype=torch.float32):
    tensor = ALIGNED[offset : offset + 8]
    return block, tensor if dtype == torch.float32 else tensor.view(dtype), ALIGNED, stride, size, scale


def test_a_second_launch_is_not_bound_again(bench):
    for scale in (0.5, 0.25):
        bench.launch(*arguments(scale=scale))
    bench.launch(*arguments(offset=4), grid=(5, 6, 7))
    assert bench.bound == 1


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param({}, {"offset": 1}, id="alignment of a pointer"),
        pytest.param({}, {"stride": 33}, id="divisibility of a stride"),
        pytest.param({}, {"stride": 1}, id="stride of 1"),
        pytest.param({}, {"stride": 1 << 32}, id="width of a stride"),
        pytest.param({}, {"size": 1 << 31}, id="width of a size"),
        pytest.param({}, {"size": -(1 << 31) - 1}, id="width of a negative size"),
        pytest.param({}, {"scale": 1}, id="integer in place of a float"),
        pytest.param({}, {"scale": None}, id="none in place of a float"),
        pytest.param({"scale": True}, {"scale": 1}, id="truth value in place of an integer"),
        pytest.param({}, {"dtype": torch.float16}, id="dtype"),
    ],
)
def test_what_triton_specialises_on_is_never_confused(first, second, bench):
    for changes in (first, second, first, second):
        bench.launch(*arguments(**changes))
    assert len({function for _, _, function, _ in bench.launches["ordinary"]}) == 2, "no other kernel is needed"


def test_options_blocks_and_devices_are_never_confused(bench):
    tensor = torch.zeros(1, 1, 64, 16)
    blocks = [TensorDescriptor(tensor, [1, 1, 64, 16], [1024, 1024, 16, 1], [1, 1, rows, 16]) for rows in (16, 32)]
    half = TensorDescriptor(tensor.half(), [1, 1, 64, 16], [1024, 1024, 16, 1], [1, 1, 16, 16])
    for _ in range(2):
        for block in (None, *blocks, half):
            bench.launch(*arguments(block=block))
        bench.launch(*arguments(), rows=32)
        bench.launch(*arguments(), num_warps=8)
        bench.driver.device = 1
        bench.launch(*arguments())
        bench.driver.device, bench.driver.stream = 0, 8
        bench.launch(*arguments())
    assert len({function for _, _, function, _ in bench.launches["ordinary"]}) == 7
    assert bench.bound == 7


integers = st.sampled_from([0, 1, 15, 16, 32, 2**31 - 1, 2**31, 2**32, 2**32 + 1, -1, -16])
calls = st.builds(
    arguments,
    offset=st.sampled_from([0, 1, 2, 4]),
    stride=integers,
    size=integers,
    scale=st.sampled_from([0.5, 1.0, 1, None]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)


@given(st.lists(st.tuples(calls, st.sampled_from([1, 16]), st.integers(0, 1)), max_size=12))
@settings(deadline=None, max_examples=50)
def test_any_calls_in_any_order_launch_what_triton_launches(launches):
    with pytest.MonkeyPatch.context() as patch:
        bench = Bench()
        patch.setattr(driver, "_active", bench.driver)
        for given_arguments, rows, device in launches * 2:
            bench.driver.device = device
            bench.launch(*given_arguments, rows=rows)


def test_hooks_see_every_launch(bench, monkeypatch):
    seen = []
    bench.launch(*arguments())
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", seen.append)
    bench.launch(*arguments())
    monkeypatch.undo()
    monkeypatch.setattr(driver, "_active", bench.driver)
    assert len(seen) == 2
    bench.kernels["replayed"].add_pre_run_hook(lambda *arguments, **options: seen.append(arguments))
    bench.launch(*arguments())
    assert len(seen) == 3


def test_a_debugging_option_compiles_another_kernel(bench, monkeypatch):
    bench.launch(*arguments())
    monkeypatch.setattr(knobs.runtime, "debug", True)
    bench.launch(*arguments())
    assert len({function for _, _, function, _ in bench.launches["replayed"]}) == 2


def test_memory_of_launches_is_limited(bench, monkeypatch):
    monkeypatch.setattr(replay, "MOST_PLANS", 3)
    for stride in range(8):
        bench.launch(*arguments(stride=stride))
    (kind,) = bench.replayed._kinds.values()
    assert len(kind.plans) <= 3


def test_a_variable_overrides_what_the_version_of_triton_decides(bench, monkeypatch):
    assert set(replay.PASSES_RAN_WITH) <= set(replay.RAN_WITH) < set(replay.REPLAYS_WITH)
    all_ran, ran, has_not_run = "3.6.0", "3.9.0", "3.8.0"
    for version, value, asked in (
        (all_ran, None, "passes"), (all_ran, "", "passes"), (all_ran, "0", "0"), (all_ran, "1", "1"),
        (ran, None, "1"), (ran, "", "1"), (ran, "0", "0"), (ran, "1", "1"), (ran, "passes", "passes"),
        (has_not_run, None, "0"), (has_not_run, "", "0"), (has_not_run, "0", "0"), (has_not_run, "1", "1"),
    ):  # fmt: skip
        monkeypatch.setattr(replay.triton, "__version__", version)
        monkeypatch.delenv(replay.VARIABLE, raising=False)
        if value is not None:
            monkeypatch.setenv(replay.VARIABLE, value)
        assert replay._asked() == asked
    monkeypatch.setenv(replay.VARIABLE, "yes")
    with refused(replay.VARIABLE, "yes", "0, 1 or passes"):
        replay._asked()
    monkeypatch.setattr(replay, "ENABLED", False)
    for _ in range(3):
        bench.launch(*arguments())
    assert bench.bound == 3


@pytest.mark.parametrize("version", ["3.5.1", "3.10.0", "4.0.0"])
def test_other_versions_of_triton_are_refused(version, monkeypatch):
    monkeypatch.setattr(replay.triton, "__version__", version)
    assert replay._asked() == "0"
    monkeypatch.setenv(replay.VARIABLE, "1")
    with refused(replay.VARIABLE, "1", "0", reason=f"{version} is installed"):
        replay._asked()


def test_kernels_of_the_interpreter_stay_as_they_are():
    assert replay.replayed(kernel) is kernel


memories = st.sampled_from([torch.float32, torch.float16]).map(lambda dtype: torch.zeros(4096, dtype=dtype))
strides = st.sampled_from([0, 1, 4, 7, 8, 64, 128])


@given(memories, st.integers(0, 9), st.tuples(strides, strides, strides), st.integers(0, 3))
def test_an_unchecked_descriptor_is_one_that_triton_would_accept(memory, offset, stride, rows):
    tensor = memory[offset:].as_strided((2, 3, rows, 16), (*stride, 1))
    block = [1, 1, 16, 16]
    if not host_functions.expressible(tensor):
        return
    made = host_functions.descriptor(TensorDescriptor, tensor, block)
    checked = TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block)
    for name, value in vars(checked).items():
        found = getattr(made, name)
        assert found is value if name == "base" else (list(found) if isinstance(value, list) else found) == value


# On a GPU.

RULE = Rule(sink_size=16, lag_size=128, top_k=32)


def tensors(length, dim=128, offset=0, heads=4, groups=2, seed=0, transposed=True):
    """Query, key, value and the output's gradient; storage offsets that 16 bytes do not divide if ``offset`` is odd."""
    generator = torch.Generator("cuda").manual_seed(seed)
    made = []
    for count in (heads, groups, groups, heads):
        memory = torch.randn(length * count * dim + offset, generator=generator, device="cuda").bfloat16()[offset:]
        made.append(
            memory.view(1, length, count, dim).transpose(1, 2) if transposed else memory.view(1, count, length, dim)
        )
    return made


def outcome(query, key, value, grad):
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    output = sparse_attention(*leaves, RULE, impl="triton")
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def ordinarily(given_tensors):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "ENABLED", False)
        return outcome(*given_tensors)


def assert_same_bits(results, expected):
    assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))


@pytest.fixture(params=itertools.product(["plain", "hopper"], ["launches", "passes"]), ids="-".join)
def kernels(request, monkeypatch):
    kind, replayed = request.param
    monkeypatch.setattr(replay, "OF_PASSES", replayed == "passes")
    if kind == "hopper" and not (hopper.CHECKED and torch.cuda.get_device_capability() == (9, 0)):
        pytest.skip("not a Hopper GPU, or a Triton that the kernels were not run with")
    monkeypatch.setattr(hopper, "ENOUGH", 0 if kind == "hopper" else 1 << 62)


@pytest.mark.gpu
def test_replays_give_the_bits_of_ordinary_launches(kernels):
    cases = [
        tensors(1025),
        tensors(777, seed=1),
        tensors(1025, offset=1),
        tensors(1024, offset=8, seed=2),
        tensors(1025, transposed=False),
        tensors(1025, dim=64),
        tensors(1025, heads=2, groups=1),
    ]
    expected = [ordinarily(case) for case in cases]
    for _ in range(3):
        for case, result in zip(cases, expected, strict=True):
            assert_same_bits(outcome(*case), result)


@pytest.mark.gpu
def test_a_repeated_call_is_not_bound_again(kernels, monkeypatch):
    case = tensors(1025)
    # The second call of a pass is recorded.
    for _ in range(2):
        outcome(*case)

    def refuse(*arguments, **options):
        raise AssertionError("bound again")

    monkeypatch.setattr(JITFunction, "run", refuse)
    outcome(*case)


@pytest.mark.gpu
def test_replays_run_on_the_current_stream_and_in_cuda_graphs(kernels):
    case, other = tensors(1025), tensors(1025, seed=3)
    expected = [ordinarily(given_tensors) for given_tensors in (case, other)]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        stream.wait_stream(torch.cuda.default_stream())
        for _ in range(3):
            results = outcome(*case)
    stream.synchronize()
    assert_same_bits(results, expected[0])
    static, graph = [tensor.clone() for tensor in case], torch.cuda.CUDAGraph()
    outcome(*static)
    with torch.cuda.graph(graph):
        results = outcome(*static)
    for given_tensors, result in zip((case, other), expected, strict=True):
        for place, tensor in zip(static, given_tensors, strict=True):
            place.copy_(tensor)
        graph.replay()
        assert_same_bits(results, result)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_devices_have_their_own_kernels(kernels):
    case = tensors(1025)
    expected = ordinarily(case)
    for device in (0, 1, 0, 1, 0, 1):
        with torch.cuda.device(device):
            results = outcome(*(tensor.to(f"cuda:{device}") for tensor in case))
        assert_same_bits([result.cuda(0) for result in results], expected)
