"""The grid that the kernels must hold on a GPU: ``make test-gpu``."""

import pytest
import torch
from ops.triton.oracle import assert_as_exact_as_eager, inputs
from ops.triton.test_fused_selectors import SELECTORS
from ops.triton.test_selection import assert_same_selection

from lrsa_lit.ops.sparse_attention import MeanPool, Rule, eager, select, sparse_attention
from lrsa_lit.ops.sparse_attention.selection import compact_buffer

pytestmark = pytest.mark.gpu

RULE = Rule(sink_size=16, lag_size=128, top_k=32)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype_and_head_size(dtype, dim):
    assert_as_exact_as_eager(inputs(1, 8, 2, 1025, dim, dtype), RULE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_grouped_heads(group, dtype):
    assert_as_exact_as_eager(inputs(2, 2 * group, 2, 1025, 64, dtype), RULE)


@pytest.mark.parametrize("length", [1, 17, 271, 272, 273, 274, 1025, 4097])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_length(length, dtype):
    assert_as_exact_as_eager(inputs(1, 4, 2, length, 64, dtype), RULE)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"chunk_size": 64}, id="C=0.5L"),
        pytest.param({"chunk_size": 192}, id="C=1.5L"),
        pytest.param({"chunk_size": 256}, id="C=2L"),
        pytest.param({"chunk_size": 5}, id="C=5"),
        pytest.param({"chunk_size": 1}, id="C=1"),
        pytest.param({"sink_size": 0}, id="S=0"),
        pytest.param({"sink_size": 200}, id="S=200"),
        pytest.param({"top_k": 0}, id="K=0"),
        pytest.param({"top_k": 1}, id="K=1"),
        pytest.param({"top_k": 128}, id="K=L"),
        pytest.param({"lag_size": 1024, "top_k": 128}, id="L=1024"),
        pytest.param({"lag_size": 100, "top_k": 33}, id="L=100"),
        pytest.param({"lag_size": 2, "top_k": 1}, id="L=2"),
        pytest.param({"compressor": MeanPool()}, id="synthesizer"),
    ],
)
def test_rule(changes):
    # Eager PyTorch needs a step for each compression: keep their number in bounds.
    config = Rule().replace(**changes)
    length = min(3001, 150 * config.lag_size)
    assert_as_exact_as_eager(inputs(1, 4, 2, length, 64, torch.bfloat16), config)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("compressor", [RULE.compressor, MeanPool()], ids=["selector", "synthesizer"])
def test_packed(compressor, dtype):
    boundaries = (0, 1, 6, 306, 4306)
    assert_as_exact_as_eager(inputs(1, 4, 2, 4306, 64, dtype), RULE.replace(compressor=compressor), boundaries)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_equal_keys(dtype):
    tensors = inputs(1, 4, 2, 1025, 64, dtype)
    tensors[1][:] = tensors[1][:, :, :1].clone()
    assert_as_exact_as_eager(tensors, RULE, capped=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_of_magnitude_10000(dtype):
    tensors = inputs(1, 4, 2, 1025, 64, dtype)
    tensors[1].mul_(1e4)
    assert_as_exact_as_eager(tensors, RULE, capped=False)


def test_fewer_queries_than_keys():
    assert_as_exact_as_eager(inputs(1, 4, 2, 2049, 64, torch.bfloat16, queries=300), RULE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("lag", "keep"), [(128, 32), (1024, 128), (100, 7)])
def test_selection(lag, keep, dtype):
    _, key, value, _ = inputs(1, 8, 8, 8192, 128, dtype)
    assert_same_selection(key, value, Rule(16, lag, keep))


@pytest.mark.parametrize("selector", SELECTORS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("lag", "dim"), [(128, 128), (128, 80), (100, 256), (1024, 64)])
def test_other_selectors_with_kernels(lag, dim, dtype, selector):
    query, key, value, _ = inputs(1, 8, 2, 9 * lag, dim, dtype)
    rule = Rule(16, lag, lag // 4, compressor=selector)
    ours = select(key, value, rule, query=query, impl="triton").indices
    exact = select(key.double(), value.double(), rule, query=query.double(), impl="eager").indices
    # Where scores tie but for rounding, either may be kept; heads that share choose alike.
    assert (ours != exact).any(dim=-1).any(dim=1).sum() <= 1


def test_a_new_top_k_does_not_compile_again():
    from lrsa_lit.ops.sparse_attention.triton import key_gradient_kernel, query_gradient_kernel, select_kernels

    tensors = inputs(1, 4, 2, 1025, 64, torch.bfloat16)
    compiled = []
    for keep in (32, 16, 1, 77):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors[:3]]
        sparse_attention(*leaves, RULE.replace(top_k=keep), impl="triton").backward(tensors[3])
        kernels = query_gradient_kernel._query_kernel, key_gradient_kernel._key_kernel, select_kernels._keep_kernel
        compiled.append([len(kernel.kernel.device_caches[0][0]) for kernel in kernels])
    assert all(count == compiled[0] for count in compiled)


def test_a_million_tokens_address_beyond_32_bits():
    length, tail, rule = 1 << 20, 200, Rule(16, 1024, 8)
    generator = torch.Generator("cuda").manual_seed(0)
    options = {"device": "cuda", "dtype": torch.bfloat16, "generator": generator}
    query = torch.randn(1, length, 33, 64, **options).transpose(1, 2)
    key, value = (torch.randn(1, length, 1, 64, **options).transpose(1, 2) for _ in range(2))
    with torch.no_grad():
        output = sparse_attention(query, key, value, rule, impl="triton")[:, :, -tail:]
        compact = compact_buffer(key, value, rule)
        expected = eager.attend(
            query[:, :, -tail:].double(),
            tuple(part.double() for part in compact),
            (key.double(), value.double()),
            rule,
            scale=0.125,
            query_offset=length - tail,
        )
    torch.testing.assert_close(output.double(), expected, rtol=2e-2, atol=2e-3)


def test_the_loss_curve_of_training_is_that_of_eager_pytorch():
    curves = [_loss_curve(impl) for impl in ("eager", "triton")]
    difference = (curves[0] - curves[1]).abs()
    assert curves[0][-20:].mean() < 0.5 * curves[0][:20].mean()
    assert difference.mean() < 0.02 * curves[0].mean()


def _loss_curve(impl: str, steps: int = 200) -> torch.Tensor:
    """A two-layer model learns to repeat the token of 60 places ago; losses of its steps."""
    torch.manual_seed(0)
    width, heads, vocabulary, rule = 128, 4, 64, Rule(4, 32, 16)

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.LayerNorm(width)
            self.qkv = torch.nn.Linear(width, 3 * width)
            self.out = torch.nn.Sequential(
                torch.nn.Linear(width, width), torch.nn.GELU(), torch.nn.Linear(width, width)
            )

        def forward(self, x):
            parts = self.qkv(self.norm(x)).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            return x + self.out(sparse_attention(*parts, rule, impl=impl).transpose(1, 2).flatten(2))

    embed, places = torch.nn.Embedding(vocabulary, width), torch.nn.Embedding(256, width)
    model = torch.nn.Sequential(Block(), Block(), torch.nn.LayerNorm(width), torch.nn.Linear(width, vocabulary)).cuda()
    embed, places = embed.cuda(), places.cuda()
    parameters = [*embed.parameters(), *places.parameters(), *model.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    generator = torch.Generator("cuda").manual_seed(1)
    losses = []
    for _ in range(steps):
        first = torch.randint(vocabulary, (8, 60), device="cuda", generator=generator)
        tokens = first.repeat(1, 5)[:, :256]
        logits = model(embed(tokens) + places.weight)
        loss = torch.nn.functional.cross_entropy(logits[:, 60:-1].flatten(0, 1), tokens[:, 61:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)
