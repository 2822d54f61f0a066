"""Each compressor by hand on small cases, and the frame that a new one must fit into."""

import math
from dataclasses import dataclass

import pytest
import torch
from helpers import random_qkv, refused
from torch import Tensor

from lrsa_lit.ops.sparse_attention import (
    ChunkWise,
    Compressor,
    KeyDiff,
    LagRelative,
    MeanPool,
    Partitions,
    RandomTokens,
    Ranking,
    Recency,
    Rule,
    Selector,
    Strided,
    ValueRelative,
    select,
    sparse_attention,
)


def partitions(
    count: int, lag: int, top_k: int = 0, *, heads: int = 1, batch: int = 1, first: int = 0, dim: int = 2
) -> Partitions:
    _, key, value = random_qkv((count + 1) * lag, batch=batch, heads=heads, dim=dim)
    key, value = key.unflatten(2, (count + 1, lag)), value.unflatten(2, (count + 1, lag))
    return Partitions(key[:, :, :-1], value[:, :, :-1], key[:, :, 1:], value[:, :, 1:], top_k, first)


def one_partition(
    key: list, next_key: list, value: list | None = None, next_value: list | None = None, top_k: int = 0
) -> Partitions:
    """A partition of one head from lists of (L, D); values default to zeros, whose scores are equal."""
    tensors = [torch.tensor(rows, dtype=torch.float64)[None, None, None] for rows in (key, next_key)]
    values = [torch.tensor(rows, dtype=torch.float64)[None, None, None] if rows else torch.zeros_like(tensors[0])
              for rows in (value, next_value)]  # fmt: skip
    return Partitions(tensors[0], values[0], tensors[1], values[1], top_k)


TOKENS = [[0.0, 0.0], [1.0, 0.0], [0.5, 10.0], [0.5, 0.0]]
REFERENCE = [[0.0, 3.0], [1.0, 0.0], [0.3, 10.0], [0.2, 4.0]]
"""Its range is [0, 1] x [0, 10], so the tokens are (0, 0), (1, 0), (.5, 1), (.5, 0): deviations 0, .71, .35, .35."""


def softmax(*numbers: float) -> list[float]:
    total = sum(math.exp(number) for number in numbers)
    return [math.exp(number) / total for number in numbers]


def test_lag_relative_scores_by_hand():
    half = math.sqrt(0.5)
    scores = LagRelative(value_weight=0).score(one_partition(TOKENS, REFERENCE))
    assert scores.flatten().tolist() == pytest.approx(softmax(0, half, half / 2, half / 2))


@pytest.mark.parametrize(("top_k", "kept"), [(0, []), (1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (4, [0, 1, 2, 3])])
def test_lag_relative_keeps_the_widest_spread_and_the_earlier_of_equals(top_k, kept):
    indices, _ = LagRelative().keep(one_partition(TOKENS, REFERENCE, top_k=top_k))
    assert indices.flatten().tolist() == kept


def test_lag_relative_adds_the_weighted_value_score():
    half = math.sqrt(0.5)
    both = one_partition(TOKENS, REFERENCE, TOKENS[::-1], REFERENCE)
    of_keys, of_values = softmax(0, half, half / 2, half / 2), softmax(half / 2, half / 2, half, 0)
    for weight in (0.0, 0.5, 1.0, 3.0):
        scores = LagRelative(value_weight=weight).score(both).flatten().tolist()
        assert scores == pytest.approx([k + weight * v for k, v in zip(of_keys, of_values, strict=True)])


def test_value_relative_is_the_value_score_alone():
    both = one_partition(TOKENS, REFERENCE, TOKENS[::-1], REFERENCE)
    half = math.sqrt(0.5)
    scores = ValueRelative().score(both).flatten().tolist()
    assert scores == pytest.approx(softmax(half / 2, half / 2, half, 0))
    swapped = Partitions(both.value, both.key, both.next_value, both.next_key, 0)
    of_keys = LagRelative(value_weight=0).score(swapped).flatten().tolist()
    assert scores == of_keys


@pytest.mark.parametrize(
    ("size", "top_k", "kept"),
    [
        (1, 3, [2, 4, 5]),
        (2, 2, [4, 5]),  # the means are 0.5, 3 and 3.5
        (2, 3, [2, 4, 5]),
        (2, 4, [2, 3, 4, 5]),
        (3, 3, [3, 4, 5]),  # 2 and 2.67
        (3, 5, [0, 1, 3, 4, 5]),
        (4, 3, [0, 4, 5]),  # 1.75 and 3.5, of two tokens
        (4, 0, []),
        (6, 4, [0, 1, 2, 3]),
        (9, 4, [0, 1, 2, 3]),
    ],
)
@pytest.mark.parametrize("values_only", [False, True])
def test_chunk_wise_keeps_whole_runs_by_their_mean(size, top_k, kept, values_only, monkeypatch):
    scores = torch.tensor([1.0, 0.1, 5.0, 1.0, 3.0, 4.0]).expand(1, 2, 3, 6)
    scored, other = (ValueRelative, LagRelative) if values_only else (LagRelative, ValueRelative)
    monkeypatch.setattr(scored, "rank", lambda *_: Ranking(scores, scores.log()))
    monkeypatch.setattr(other, "rank", None)
    indices, _ = ChunkWise(size, values_only).keep(partitions(3, 6, top_k, heads=2))
    assert indices.tolist() == [[[kept] * 3] * 2]


def test_a_shorter_last_run_counts_by_its_own_mean():
    compressor, parts = ChunkWise(4), partitions(5, 6, 2, heads=2, batch=2)
    scores = LagRelative().score(parts)
    means = scores[..., :4].mean(dim=-1), scores[..., 4:].mean(dim=-1)
    indices, ranked = compressor.keep(parts)
    torch.testing.assert_close(ranked[..., 0], means[0])
    torch.testing.assert_close(ranked[..., 5], means[1])
    last = means[1] > means[0]
    assert last.any()
    assert not last.all()
    assert (indices[..., 0] == 4).equal(last)


def test_runs_of_one_token_keep_what_the_scores_keep():
    parts = partitions(4, 16, 5, heads=2)
    for values_only, alone in ((False, LagRelative()), (True, ValueRelative())):
        assert ChunkWise(1, values_only).keep(parts)[0].equal(alone.keep(parts)[0])


@pytest.mark.parametrize("seed", [1.5, True, "a", None])
def test_a_seed_is_a_whole_number(seed):
    with refused("seed", seed, "an integer"):
        RandomTokens(seed)


@pytest.mark.parametrize("size", [0, -4, 2.0, True, "4"])
def test_a_run_has_a_whole_number_of_tokens(size):
    with refused("size", size, "integer >= 1"):
        ChunkWise(size)


@pytest.mark.parametrize(
    "compressor", [ChunkWise(3), KeyDiff(), RandomTokens(4), Recency(), Strided(), ValueRelative()]
)
def test_gradients_of_a_selector_reach_what_it_keeps_and_nothing_else(compressor):
    parts = partitions(3, 8, 3, heads=2)
    key, value = parts.key.clone().requires_grad_(), parts.value.clone().requires_grad_()
    given = Partitions(key, value, parts.next_key.requires_grad_(), parts.next_value.requires_grad_(), 3)
    kept, _ = compressor.keep(given)
    compact_key, compact_value = compressor.compress(given)
    (compact_key.sum() + 2 * compact_value.sum()).backward()
    member = torch.zeros(key.shape[:-1], dtype=key.dtype).scatter(-1, kept, 1.0)[..., None].expand_as(key)
    assert key.grad.equal(member)
    assert value.grad.equal(2 * member)
    assert parts.next_key.grad is None


def test_keys_that_are_like_the_others_are_dropped():
    """Three keys point one way, whatever their lengths, and one another way."""
    key = torch.tensor([[3.0, 0.0], [0.5, 0.0], [0.0, 2.0], [1.0, 0.0]], dtype=torch.float64)[None, None, None]
    parts = Partitions(key, key, key, key, 2)
    kept, scores = KeyDiff().keep(parts)
    mean = (0.75, 0.25)
    assert scores.flatten().tolist() == pytest.approx([-mean[each] / math.hypot(*mean) for each in (0, 0, 1, 0)])
    assert kept.flatten().tolist() == [0, 2]


def test_a_constant_channel_is_zero_and_still_counts():
    tokens = [[*row, 7.0 + place] for place, row in enumerate(TOKENS)]
    reference = [[*row, 7.0] for row in REFERENCE]
    scores = LagRelative(value_weight=0).score(one_partition(tokens, reference))
    rows = [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [0.5, 0.0, 0.0]]
    expected = softmax(*[torch.tensor(row, dtype=torch.float64).std().item() for row in rows])
    assert scores.flatten().tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("ratio", "constant"), [(0.9e-6, True), (1.1e-6, False)])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_channel_is_constant_up_to_a_millionth_of_its_magnitude(ratio, constant, sign):
    reference = [[*row, sign * (1000.0 + (1000.0 * ratio if place == 2 else 0))] for place, row in enumerate(REFERENCE)]
    tokens = [[*row, 0.0] for row in TOKENS]
    scores = LagRelative(value_weight=0).score(one_partition(tokens, reference)).flatten()
    by_two_channels = softmax(*[torch.tensor([*row, 0.0]).double().std().item() for row in ([0, 0], [1, 0])])
    assert (abs((scores[1] / scores[0]).item() - by_two_channels[1] / by_two_channels[0]) < 1e-9) == constant


def test_recency_keeps_the_last_tokens():
    indices, _ = Recency().keep(partitions(3, 5, 2, heads=2))
    assert indices.tolist() == [[[[3, 4]] * 3] * 2]


@pytest.mark.parametrize(
    ("lag", "top_k", "kept"), [(8, 4, [0, 2, 4, 6]), (8, 3, [0, 2, 5]), (5, 2, [0, 2]), (5, 0, []), (3, 3, [0, 1, 2])]
)
def test_strided_keeps_the_places_floor_of_i_times_l_over_k(lag, top_k, kept):
    indices, _ = Strided().keep(partitions(2, lag, top_k, heads=2))
    assert indices.tolist() == [[[kept] * 2] * 2]


@pytest.mark.parametrize(
    ("lag", "top_k", "groups"),
    [(4, 2, [[0, 1], [2, 3]]), (5, 2, [[0, 1, 2], [3, 4]]), (7, 3, [[0, 1, 2], [3, 4], [5, 6]]), (3, 0, [])],
)
def test_mean_pool_averages_consecutive_groups(lag, top_k, groups):
    parts = partitions(3, lag, top_k, heads=2, batch=2)
    key, value = MeanPool().compress(parts)
    assert key.shape == value.shape == (2, 2, 3, top_k, 2)
    for place, group in enumerate(groups):
        torch.testing.assert_close(key[:, :, :, place], parts.key[:, :, :, group].mean(dim=3))
        torch.testing.assert_close(value[:, :, :, place], parts.value[:, :, :, group].mean(dim=3))


def test_mean_pool_gives_every_token_of_a_group_its_share_of_the_gradient():
    parts = partitions(1, 5)
    key = parts.key.clone().requires_grad_()
    pooled, _ = MeanPool().compress(Partitions(key, parts.value, parts.next_key, parts.next_value, 2))
    pooled[..., 0, :].sum().backward()
    assert key.grad[0, 0, 0, :, 0].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0, 0])


def test_mean_pool_averages_half_precision_in_single():
    lag = 60  # 1 / 60 in bfloat16 is off by 0.3 %
    parts = partitions(1, lag, dim=64)
    half = Partitions(*(tensor.bfloat16() for tensor in (parts.key, parts.value, parts.next_key, parts.next_value)), 1)
    pooled = MeanPool().compress(half)
    for ours, tokens in zip(pooled, (half.key, half.value), strict=True):
        assert ours.dtype == torch.bfloat16
        mean = tokens.double().mean(dim=3, keepdim=True).bfloat16()
        assert (ours == mean).float().mean() > 0.95, "rounded once, at the end"


def kept_at_random(seed: int, count: int = 6, lag: int = 12, top_k: int = 4, **shape: int) -> Tensor:
    return RandomTokens(seed).keep(partitions(count, lag, top_k, **shape))[0]


def test_random_tokens_repeat_with_the_seed_and_only_with_it():
    assert kept_at_random(3).equal(kept_at_random(3))
    assert not kept_at_random(3).equal(kept_at_random(4))
    rows = kept_at_random(3, batch=2)
    assert rows[0].equal(rows[1]), "a row must keep what it keeps alone"


def test_random_tokens_differ_between_heads_partitions_and_layers():
    kept = kept_at_random(0, heads=3)[0]
    assert not kept[0].equal(kept[1])
    assert not kept[1].equal(kept[2])
    assert not kept[0, 0].equal(kept[0, 1])
    layers = [RandomTokens(0).for_layer(layer).keep(partitions(6, 12, 4))[0] for layer in range(3)]
    assert not layers[0].equal(layers[1])
    assert not layers[1].equal(layers[2])


def test_a_seed_keeps_the_same_tokens_in_every_version():
    """Another hash would be another rule under the same digest; these are of the hash in Python's own integers."""
    kept = kept_at_random(7, count=3, lag=10, top_k=3, heads=2)
    assert kept[0].tolist() == [[[0, 2, 7], [2, 3, 6], [4, 5, 9]], [[3, 4, 8], [1, 2, 3], [2, 8, 9]]]


def test_random_tokens_keep_each_place_equally_often():
    indices = kept_at_random(1, count=3000, lag=8, top_k=2, dim=1)
    counts = indices.flatten().bincount(minlength=8)
    assert counts.sum() == 6000
    assert counts.min() > 0.9 * 750
    assert counts.max() < 1.1 * 750
    pairs = (indices[0, 0, :, 0] * 8 + indices[0, 0, :, 1]).bincount(minlength=64)
    assert (pairs > 0).sum() == 28, "every pair of places turns up"


def test_random_scores_lie_in_the_unit_interval_and_do_not_repeat():
    for seed in (0, -1, 2**31, 10**18):
        scores = RandomTokens(seed).score(partitions(20, 64, heads=3))
        assert scores.min() >= 0
        assert scores.max() < 1
        assert len(scores.unique()) >= scores.numel() - 2, "heads, partitions and tokens draw apart"


@dataclass(frozen=True)
class SmallestKeys(Selector):
    """Keep the keys of the smallest norm: what a newcomer would write."""

    def score(self, partitions):
        return -partitions.key.float().norm(dim=-1)


@dataclass(frozen=True)
class Doubled(Compressor):
    """A synthesizer: twice the first K pairs."""

    def compress(self, partitions):
        return partitions.key[..., : partitions.top_k, :] * 2, partitions.value[..., : partitions.top_k, :] * 2


def test_a_selector_of_ten_lines_works_through_the_config():
    config = Rule(1, 4, 1, compressor=SmallestKeys())
    query, key, value = random_qkv(20)
    selection = select(key, value, config)
    norms = key[:, :, 1:17].norm(dim=-1).unflatten(2, (4, 4))[:, :, :3]
    starts = torch.tensor([1, 5, 9])
    assert selection.indices.squeeze(-1).equal(norms.argmin(dim=-1) + starts)
    torch.testing.assert_close(selection.scores, -norms.float())
    output = sparse_attention(query, key, value, config)
    assert not torch.allclose(output, sparse_attention(query, key, value, config.replace(compressor=LagRelative())))


def test_a_synthesizer_of_ten_lines_works_through_the_config():
    config = Rule(0, 2, 1, compressor=Doubled())
    query, key, value = random_qkv(5, heads=1, group=1)
    keys = torch.cat([key[:, :, :1] * 2, key[:, :, 2:5]], dim=2)
    values = torch.cat([value[:, :, :1] * 2, value[:, :, 2:5]], dim=2)
    weights = (query[:, :, 4:] @ keys.mT * query.shape[-1] ** -0.5).softmax(dim=-1)
    torch.testing.assert_close(sparse_attention(query, key, value, config)[:, :, 4:], weights @ values)


def test_the_two_parts_of_the_frame_are_abstract():
    for incomplete in (Compressor, Selector):
        with pytest.raises(TypeError, match="abstract"):
            incomplete()
