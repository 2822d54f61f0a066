"""Selection with a gradient: the output of the wrapped selector, the gradient of a smooth computation."""

import pytest
import torch
from helpers import boundaries, random_qkv, refused

from lrsa_lit.ops.sparse_attention import (
    ChunkWise,
    Compressor,
    HeadRules,
    KeyDiff,
    KeyValueStream,
    LagRelative,
    LagRelativeTail,
    MeanPool,
    Partitions,
    QueryAttention,
    RandomTokens,
    Recency,
    Rule,
    StraightThrough,
    Strided,
    ValueRelative,
    select,
    sparse_attention,
)

WRAPPED = [LagRelative(), ValueRelative(), ChunkWise(3), LagRelativeTail(), KeyDiff(), QueryAttention(3)]
RULE = Rule(3, 8, 3, compressor=StraightThrough())
CONTROL = StraightThrough(of=RandomTokens(5), by=LagRelative())


def gradients(tensors, rule, **options):
    output = sparse_attention(*tensors, rule, **options)
    return torch.autograd.grad(output.square().sum(), tensors)


@pytest.mark.parametrize("wrapped", WRAPPED, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_output_is_that_of_the_wrapped_selector_bit_by_bit(wrapped, dtype):
    tensors = random_qkv(61, batch=2, dtype=dtype, grad=True)
    plain = sparse_attention(*tensors, RULE.replace(compressor=wrapped))
    rule = RULE.replace(compressor=StraightThrough(wrapped))
    assert sparse_attention(*tensors, rule).equal(plain)
    with torch.no_grad():
        assert sparse_attention(*tensors, rule).equal(plain)


def lag_relative(tokens, reference):
    low, high = reference.amin(-2, keepdim=True), reference.amax(-2, keepdim=True)
    return ((tokens - low) / (high - low)).std(-1).softmax(-1)


def smooth(key, value, next_key, next_value, indices, constant, temperature):
    """Values times 1 + s - (a constant), from the definition: nothing here stops a gradient."""
    score = lag_relative(key, next_key) + lag_relative(value, next_value)
    standard = (score - score.mean(-1, keepdim=True)) / score.std(-1, correction=0, keepdim=True)
    soft = torch.sigmoid(standard / temperature)
    constant = soft.detach() if constant is None else constant
    weighed = value * (1 + soft - constant)[..., None]
    return torch.take_along_dim(weighed, indices[..., None], dim=-2), soft


@pytest.mark.parametrize("compressor", [StraightThrough(temperature=0.7), CONTROL], ids=["own", "random"])
def test_the_gradient_is_that_of_a_smooth_computation(compressor):
    _, key, value = (x.unflatten(2, (3, 8)) for x in random_qkv(24, heads=2, dim=3))
    tensors = [
        x.contiguous().requires_grad_() for x in (key[:, :, :-1], value[:, :, :-1], key[:, :, 1:], value[:, :, 1:])
    ]
    parts = Partitions(*tensors, 3)
    indices, _ = compressor.keep(parts)
    assert indices.equal(compressor.of.keep(parts)[0])
    _, soft = smooth(*tensors, indices, None, compressor.temperature)
    torch.testing.assert_close(compressor.softened(parts), soft)

    def expected(*given):
        return smooth(*given, indices, soft.detach(), compressor.temperature)[0]

    assert torch.autograd.gradcheck(expected, tensors)
    found = compressor.compress(parts)[1]
    assert found.equal(compressor.of.compress(parts)[1])
    weights = torch.randn(found.shape, dtype=found.dtype)
    ours, truth = (torch.autograd.grad((made * weights).sum(), tensors) for made in (found, expected(*tensors)))
    torch.testing.assert_close(ours, truth)
    assert all(gradient.abs().sum() > 0 for gradient in ours)


def test_a_score_rises_where_more_of_its_pair_would_lower_the_loss():
    key, value = (x.unflatten(2, (1, 8)).requires_grad_() for x in random_qkv(8)[1:])
    compressor, parts = StraightThrough(KeyDiff()), Partitions(key, value, key, value, 3)
    kept = compressor.keep(parts)[0][0, 0, 0, 0]
    # The loss falls as the value of the first kept pair of head 0 grows.
    (-compressor.compress(parts)[1][0, 0, 0, 0] @ value[0, 0, 0, kept].detach()).backward()
    moved = Partitions(key - 1e-4 * key.grad, value, key, value, 3)
    before, after = (compressor.softened(given)[0, 0, 0, kept] for given in (parts, moved))
    assert after > before


@pytest.mark.parametrize("compressor", [StraightThrough(), CONTROL], ids=["own", "random"])
def test_the_choice_gets_a_gradient_that_the_wrapped_selector_does_not_give(compressor):
    tensors = random_qkv(60, grad=True)
    through = gradients(tensors, RULE.replace(compressor=compressor))
    plain = gradients(tensors, RULE.replace(compressor=compressor.of))
    torch.testing.assert_close(through[0], plain[0])
    for ours, theirs in zip(through[1:], plain[1:], strict=True):
        assert (ours - theirs).abs().max() > 1e-3 * theirs.abs().max()


def test_queries_that_choose_get_a_gradient_too():
    tensors, compressor = random_qkv(60, grad=True), StraightThrough(QueryAttention(2), by=QueryAttention(5))
    assert compressor.window == 5
    through, plain = (gradients(tensors, RULE.replace(compressor=one)) for one in (compressor, compressor.of))
    assert not torch.allclose(through[0], plain[0])


def test_packed_sequences_have_the_gradients_of_each_alone():
    lengths, tensors = [30, 1, 41], random_qkv(72, grad=True)
    packed = gradients(tensors, RULE, cu_seqlens=boundaries(lengths))
    blocks = [slice(0, 30), slice(30, 31), slice(31, 72)]
    alone = [gradients([x[:, :, block].detach().requires_grad_() for x in tensors], RULE) for block in blocks]
    torch.testing.assert_close(packed, tuple(torch.cat(parts, dim=2) for parts in zip(*alone, strict=True)))


def test_heads_of_their_own_k_choose_as_they_do_alone():
    tensors = random_qkv(60, heads=2, grad=True)
    rules = HeadRules(RULE.replace(compressor=CONTROL), (2, 8))
    alone = gradients(tensors, RULE.replace(compressor=CONTROL, top_k=2))
    torch.testing.assert_close(gradients(tensors, rules)[2][:, :1], alone[2][:, :1])


def test_the_kernels_give_the_gradients_of_eager_pytorch():
    pytest.importorskip("triton")
    from ops.triton.oracle import inputs

    *tensors, _ = inputs(1, 2, 1, 33, 16)
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    rule, packing = RULE.replace(compressor=StraightThrough(KeyDiff(), by=LagRelative())), boundaries([4, 29])
    found, expected = (gradients(leaves, rule, cu_seqlens=packing, impl=impl) for impl in ("triton", "eager"))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    # Where nothing trains, they choose as well.
    plain = rule.replace(compressor=KeyDiff())
    kept = [select(*leaves[1:], one, impl="triton").indices for one in (rule, plain)]
    assert kept[0].equal(kept[1])
    with torch.no_grad():
        assert sparse_attention(*leaves, rule, impl="triton").equal(sparse_attention(*leaves, plain, impl="triton"))


@torch.no_grad()
def test_kernels_that_stream_choose_by_the_queries_of_the_wrapped_selector():
    pytest.importorskip("triton")
    from ops.triton.oracle import inputs

    tensors = inputs(1, 2, 1, 41, 16)[:3]
    compressor = StraightThrough(QueryAttention(2), by=QueryAttention(5))
    stream, parts = KeyValueStream(RULE.replace(compressor=compressor), "triton"), []
    for part in (slice(0, 22), slice(22, 40), slice(40, 41)):
        parts.append(stream.attend(*(tensor[:, :, part] for tensor in tensors), 0.25))
    expected = sparse_attention(*tensors, RULE.replace(compressor=QueryAttention(2)), impl="eager")
    torch.testing.assert_close(torch.cat(parts, dim=2), expected, rtol=0, atol=1e-5)


def test_layers_of_a_random_control_lose_different_tokens():
    assert CONTROL.for_layer(1).of == CONTROL.of.for_layer(1) != CONTROL.for_layer(2).of
    assert Compressor.from_dict(CONTROL.to_dict()) == CONTROL


def test_settings_that_train_nothing_are_refused():
    for constant in (RandomTokens(), Recency(), Strided()):
        with refused("by", type(constant).__name__, "score depends"):
            StraightThrough(constant)
        with refused("by", type(constant).__name__, "score depends"):
            StraightThrough(LagRelative(), by=constant)
    for wrong in (MeanPool(), StraightThrough()):
        with refused("of", type(wrong).__name__, "a Selector"):
            StraightThrough(wrong)
    with refused("by.init_args.seed", 0.5):
        StraightThrough(by={"class_path": "RandomTokens", "init_args": {"seed": 0.5}})
    with refused("temperature", 0.0, "> 0"):
        StraightThrough(temperature=0.0)


def test_scores_that_are_equal_give_a_finite_gradient():
    _, key, value = random_qkv(60)
    tensors = [x.detach().requires_grad_() for x in (random_qkv(60)[0], torch.ones_like(key), torch.ones_like(value))]
    assert all(gradient.isfinite().all() for gradient in gradients(tensors, RULE))
