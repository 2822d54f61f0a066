"""Attention of one query per row over a partly filled buffer: on the CPU under the interpreter, on a GPU compiled."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.triton.oracle import CAP, DEVICE, FACTOR

from lrsa_lit.ops.sparse_attention import eager as eager_attention
from lrsa_lit.ops.sparse_attention.triton import decode_kernels
from lrsa_lit.ops.sparse_attention.triton.decode_kernels import attend_one

# The running maximum starts near the end of float32: what it is worth then overflows on its way to zero.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in multiply")

# Triton's interpreter computes bfloat16 products wrongly.
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
CAPACITY = 300


def buffers(batch, heads, group, capacity, dim, dtype=torch.float32, seed=0):
    """Query (B, Hq, 1, D) and full buffers (B, H, capacity, D), contiguous."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, heads * group, 1, dim), (batch, heads, capacity, dim), (batch, heads, capacity, dim)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def filled(count):
    return torch.tensor([count], dtype=torch.int32, device=DEVICE)


def transposed(tensor):
    """The same values, laid out as (B, T, heads, D)."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def embedded(tensor):
    """The same values, as the middle of a larger tensor of NaN whose rows are 16 wider."""
    batch, heads, rows, dim = tensor.shape
    host = tensor.new_full((batch + 1, heads + 2, rows + 3, dim + 16), torch.nan)
    view = host[1:, 1:-1, 2:-1, 8:-8]
    view.copy_(tensor)
    return view


def softmax_attention(query, key, value, length, scale):
    """What is right, in float64 and written out: (B, Hq, 1, D)."""
    group = query.shape[1] // key.shape[1]
    key, value = (tensor[:, :, :length].double().repeat_interleave(group, dim=1) for tensor in (key, value))
    return (query.double() @ key.mT * scale).softmax(dim=-1) @ value


def eager(query, key, value, length, scale):
    """What PyTorch makes of it in the same dtype."""
    grouped = query.unflatten(1, (key.shape[1], -1))
    return eager_attention.causal_attention(grouped, key[:, :, :length], value[:, :, :length], scale).flatten(1, 2)


def poisoned(tensor, length):
    """The buffer itself, its unfilled rows NaN."""
    tensor[:, :, length:] = torch.nan
    return tensor


def assert_exact(query, key, value, length, scale=None, capped=True, slack=0.0, run=attend_one):
    """The kernels err at most FACTOR times what eager PyTorch does, and read no unfilled row, which here are NaN.

    Where the output is a single query's, how well it rounds is luck: ``slack`` allows for it, in last places.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    truth = softmax_attention(query, key, value, length, scale)
    allowed = (eager(query, key, value, length, scale).double() - truth).square().mean().sqrt()
    got = run(query, poisoned(key, length), poisoned(value, length), filled(length), scale)
    assert got.dtype == query.dtype
    assert got.shape == query.shape
    assert got.is_contiguous()
    assert got.isfinite().all()
    size, error = truth.square().mean().sqrt(), (got.double() - truth).square().mean().sqrt()
    bar = FACTOR * allowed + 1e-9 + slack * torch.finfo(query.dtype).eps * size
    assert error <= bar, f"error {error:.2e}, eager has {allowed:.2e}"
    if capped:
        assert error <= CAP[query.dtype] * size, f"relative error {error / size:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200, CAPACITY])
def test_length(length, dtype):
    # Between two tokens a single difference of scores decides, and how well NumPy sums those depends on its version.
    assert_exact(*buffers(2, 2, 4, CAPACITY, 64, dtype), length, slack=1.0 if length == 2 else 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [1, 3, 4, 17, 70])
def test_grouped_heads(group, dtype):
    assert_exact(*buffers(2, 2, group, CAPACITY, 16, dtype), 200)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 24, 64, 80, 128, 136, 256])
def test_head_size(dim, dtype):
    assert_exact(*buffers(2, 1, 3, 150, dim, dtype), 141)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [transposed, embedded], ids=lambda layout: layout.__name__)
def test_strides(layout, dtype):
    tensors = [layout(tensor) for tensor in buffers(2, 2, 3, CAPACITY, 80, dtype)]
    assert not any(tensor.is_contiguous() for tensor in tensors[1:])
    assert_exact(*tensors, 200)


def test_key_and_value_of_different_strides():
    query, key, value = buffers(2, 3, 2, CAPACITY, 16)
    key, value = transposed(key), embedded(value)
    assert all(one != other for one, other in zip(key.stride()[:3], value.stride()[:3], strict=True))
    assert_exact(embedded(query), key, value, 200)


def test_rows_that_are_not_contiguous():
    query, key, value = buffers(2, 2, 3, CAPACITY, 16)
    key, value = (tensor.mT.contiguous().mT for tensor in (key, value))
    assert key.stride(-1) == value.stride(-1) == CAPACITY
    assert_exact(query, key, value, 200)


def test_a_slice_of_several_blocks():
    query, key, value = buffers(1, 1, 2, 9000, 16)
    tile, splits = decode_kernels._cut_for(16, query.dtype, 2, 1, 9000)
    assert splits == 128
    assert splits * tile.columns < 8999
    assert_exact(query, key, value, 8999)


def test_one_slice_only():
    query, key, value = buffers(1, 135, 2, 100, 16)
    assert decode_kernels._cut_for(16, query.dtype, 2, 135, 100)[1] == 1
    assert_exact(query, key, value, 99)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_of_magnitude_10000(dtype):
    query, key, value = buffers(2, 2, 4, CAPACITY, 64, dtype)
    assert_exact(query, key.mul_(1e4), value, 290, capped=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_highest_scores_near_each_other_in_different_slices(dtype):
    # Scores of about 1e5 that differ by 1/4 at most: a logarithm of a slice's sum keeps only 1/100 of it.
    query, key, value = buffers(2, 2, 4, CAPACITY, 16, dtype)
    query[:], key[:] = 0, 0
    query[..., 0], query[..., 1] = 256, 1
    key[..., 0] = 400
    key[..., 1] = torch.arange(CAPACITY, device=DEVICE) % 5 / 16
    assert_exact(query, key, value, 290, scale=1.0)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1e-3, 2.0])
def test_scale(scale):
    assert_exact(*buffers(2, 2, 4, CAPACITY, 16), 200, scale=scale)


def test_length_is_read_from_the_device():
    query, key, value = buffers(2, 2, 3, CAPACITY, 16)
    length = filled(1)
    for count in (1, 64, 65, 300, 7):
        length.fill_(count)
        got = attend_one(query, key, value, length, 0.25)
        torch.testing.assert_close(got, softmax_attention(query, key, value, count, 0.25).float())


def assert_each_row_exact(query, key, value, lengths, scale=None, run=attend_one):
    """Every row is exact for its own length, and nothing behind it is read, which here is NaN."""
    for row, count in enumerate(lengths):
        key[row, :, count:] = value[row, :, count:] = torch.nan
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    got = run(query, key, value, torch.tensor(lengths, dtype=torch.int32, device=DEVICE), scale)
    assert got.is_contiguous()
    for row, count in enumerate(lengths):
        tensors = [tensor[row, None] for tensor in (query, key, value)]
        assert_exact(*tensors, count, scale, slack=1.0, run=lambda *_, row=row: got[row, None])


IMPLEMENTATIONS = pytest.mark.parametrize("run", [attend_one, eager_attention.attend_one], ids=["triton", "eager"])


@IMPLEMENTATIONS
@pytest.mark.parametrize("lengths", [(1, CAPACITY), (63, 200, 64, 1, 65), (130, 2, 299)], ids=str)
@pytest.mark.parametrize("group", [1, 3])
def test_a_length_for_each_row(group, lengths, run):
    assert_each_row_exact(*buffers(len(lengths), 2, group, CAPACITY, 24), lengths, run=run)


@IMPLEMENTATIONS
@pytest.mark.parametrize("rows", [1, 3])
def test_equal_lengths_are_one_length(rows, run):
    query, key, value = (transposed(tensor) for tensor in buffers(rows, 2, 3, CAPACITY, 40))
    one, each = filled(211), filled(211).expand(2 * rows).contiguous()[::2]
    assert run(query, key, value, each, 0.2).equal(run(query, key, value, one, 0.2))


@IMPLEMENTATIONS
def test_lengths_of_another_batch_are_refused(run):
    with pytest.raises(RuntimeError):
        run(*buffers(3, 2, 1, 40, 16), filled(7).expand(2), 0.2)


def test_compiled_as_one_graph():
    query, key, value = buffers(2, 2, 3, CAPACITY, 16)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(query, key, value, length):
        return attend_one(query * 2, key, value, length, 0.25) + 1

    length = filled(1)
    step(query, key, value, length)
    with torch.compiler.set_stance("fail_on_recompile"):
        for count in (1, 64, 290):
            length.fill_(count)
            expected = softmax_attention(query * 2, key, value, count, 0.25) + 1
            torch.testing.assert_close(step(query, key, value, length), expected.float())


def test_registration():
    tensors = [transposed(tensor) for tensor in buffers(2, 2, 3, 70, 16)]
    for length in (filled(65), torch.tensor([65, 3], dtype=torch.int32, device=DEVICE)):
        torch.library.opcheck(attend_one, (*tensors, length, 0.25))


@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    group=st.integers(1, 20),
    dim=st.integers(2, 12).map(lambda eighth: 8 * eighth),
    lengths=st.tuples(st.integers(1, 200), st.integers(1, 200)).map(sorted),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    layout=st.sampled_from([torch.clone, transposed, embedded]),
    seed=st.integers(0, 2**16),
)
def test_any_shape(batch, heads, group, dim, lengths, dtype, layout, seed):
    length, capacity = lengths
    tensors = [layout(tensor) for tensor in buffers(batch, heads, group, capacity, dim, dtype, seed)]
    assert_exact(*tensors, length, slack=1.0)


@settings(max_examples=15)
@given(
    heads=st.integers(1, 3),
    group=st.integers(1, 20),
    dim=st.integers(2, 12).map(lambda eighth: 8 * eighth),
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=4),
    spare=st.integers(0, 100),
    layout=st.sampled_from([torch.clone, transposed, embedded]),
    seed=st.integers(0, 2**16),
)
def test_any_lengths(heads, group, dim, lengths, spare, layout, seed):
    tensors = buffers(len(lengths), heads, group, max(lengths) + spare, dim, seed=seed)
    assert_each_row_exact(*(layout(tensor) for tensor in tensors), lengths)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
def test_a_cuda_graph_follows_the_length(dim):
    query, key, value = buffers(1, 8, 4, 20_000, dim, torch.bfloat16)
    length = filled(1)
    attend_one(query, key, value, length, 0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = attend_one(query, key, value, length, 0.1)

    def replay(query, key, value, count, scale):
        length.copy_(count)
        graph.replay()
        return output

    # Captured at one key and replayed at all; then fewer each time, for what lies behind them becomes NaN.
    for count in (20_000, 16_385, 1000, 65, 64, 1):
        assert_exact(query, key, value, count, scale=0.1, run=replay)


@pytest.mark.gpu
def test_a_cuda_graph_follows_the_length_of_each_row():
    query, key, value = buffers(3, 8, 4, 20_000, 64, torch.bfloat16)
    length = filled(1).expand(3).contiguous()
    attend_one(query, key, value, length, 0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = attend_one(query, key, value, length, 0.1)
    for lengths in ((20_000, 9000, 1), (65, 8999, 1), (1, 64, 1)):
        length.copy_(torch.tensor(lengths))
        graph.replay()
        for row, count in enumerate(lengths):
            tensors = [tensor[row, None] for tensor in (query, key, value)]
            assert_exact(*tensors, count, scale=0.1, slack=1.0, run=lambda *_, row=row: output[row, None])
