"""Corner cases of systems of one cut, and the memory that they hold."""

import pytest
import torch
from helpers import refused
from systems.recorded import cut, fed, inputs, rotated

from lrsa_lit.attention import LRSACache, LRSAConfig, cache_argument, prefill, using
from lrsa_lit.systems import (
    TOVA,
    AdaKV,
    ChunkKV,
    ChunkKVPress,
    ExpectedAttention,
    KeyDiff,
    KeyDiffBlocks,
    KeyNorm,
    LagKVPress,
    Random,
    SnapKV,
    StreamingLLM,
    System,
)

CLASSES = [TOVA, AdaKV, ChunkKV, ChunkKVPress, ExpectedAttention, KeyDiff, KeyNorm, LagKVPress, Random, SnapKV, StreamingLLM]  # fmt: skip  # noqa: E501


def tensors(tokens=14):
    """Query, key and value of the recorded prompt, as they are attended to."""
    query, key, value = inputs("adakv")
    return tuple(x[..., :tokens, :] for x in (rotated(query), rotated(key), value))


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("tokens", [1, 3, 14])
def test_prompts_of_no_more_tokens_than_stay_are_not_cut(cls, tokens):
    """Whatever the window, and without a score."""
    assert cut(cls(pairs=14), *tensors(tokens)) == [list(range(tokens))] * 2
    assert cut(cls(1.0), *tensors(tokens)) == [list(range(tokens))] * 2


@pytest.mark.parametrize("cls", [StreamingLLM, ExpectedAttention, LagKVPress])
def test_sinks_beyond_the_prompt_leave_its_first_tokens(cls):
    assert cut(cls(pairs=3, sink_size=20), *tensors()) == [[0, 1, 2]] * 2


@pytest.mark.parametrize("tokens", [3, 5])
def test_a_window_that_leaves_nothing_to_score_is_refused(tokens):
    with refused("window", 5, reason=f"the whole prompt of {tokens} tokens"):
        cut(SnapKV(0.5, window=5), *tensors(tokens))


def test_of_padded_rows_the_refused_one_is_named(model, ids):
    mask = (torch.arange(12) >= torch.tensor([0, 7])[:, None]).long()
    with using(model, LRSAConfig(system=SnapKV(0.5, window=6))):
        cache = LRSACache.of(model)
        prefill(model, ids(2, 12), cache, attention_mask=mask)
        with refused("window", 6, reason="the whole prompt of 5 tokens"):
            cache.end_prompt()


def test_chunkkv_keeps_its_window_where_no_more_stay_and_cuts_no_prompt_within_it():
    assert cut(ChunkKV(pairs=2, size=4, window=5), *tensors()) == [[9, 10, 11, 12, 13]] * 2
    assert cut(ChunkKV(pairs=2, size=4, window=5), *tensors(5)) == [[0, 1, 2, 3, 4]] * 2


def test_chunks_of_one_token_are_the_scorer_with_heads_that_share():
    scores = SnapKV(window=3).scores(fed(SnapKV(window=3), *tensors()).prompt()).sum(dim=1)
    best = scores.topk(7).indices.sort().values.tolist()
    assert cut(ChunkKVPress(0.5, scorer=SnapKV(window=3), size=1), *tensors()) == best * 2


def test_rows_of_a_batch_may_keep_chunks_of_different_lengths(model, ids):
    """The last chunk is shorter: a row that keeps it holds fewer pairs."""
    prompt, answer = ids(16, 22), ids(16, 1)
    with using(model, LRSAConfig(system=ChunkKVPress(0.5, scorer=KeyNorm(), size=8))), torch.no_grad():
        cache = LRSACache.of(model)
        prefill(model, prompt, cache)
        cache.end_prompt()
        sizes = [stream.stored[0].shape[2] for stream in cache.layers[0].streams]
        assert set(sizes) == {6, 8}
        assert model(answer, **cache_argument(model, cache)).logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cls", CLASSES)
def test_scores_are_in_float32_whatever_the_keys_are(cls, dtype):
    options = {"window": 3} if cls is SnapKV else {"scorer": KeyDiff()} if cls in (AdaKV, ChunkKVPress) else {}
    given = [x.to(dtype) for x in tensors()]
    found = cls(**options).scores(fed(cls(**options), *given).prompt())
    assert found.dtype in (torch.float32, torch.float64)
    exact = cls(**options).scores(fed(cls(**options), *(x.float() for x in given)).prompt())
    torch.testing.assert_close(found, exact, check_dtype=False)


def test_of_equal_scores_the_earlier_stay():
    key = torch.ones(1, 2, 9, 4)
    assert cut(KeyNorm(pairs=4), None, key) == [[0, 1, 2, 3]] * 2
    assert cut(SnapKV(pairs=4, window=2, pooling="max"), None, key) == [[0, 1, 7, 8]] * 2


def test_max_pooling_keeps_the_neighbours_of_the_best():
    key = torch.zeros(1, 1, 9, 4)
    key[..., 4, :] = 5
    query = torch.ones(1, 1, 1, 9, 4)
    system = SnapKV(pairs=5, window=2, kernel=3, pooling="max")
    assert cut(system, query, key) == [[3, 4, 5, 7, 8]]


def test_random_pairs_differ_by_seed_layer_and_head_but_not_by_row_or_device():
    _, key, _ = tensors()
    kept = [cut(Random(seed=seed), None, key, layer=layer) for seed, layer in ((0, 0), (0, 1), (1, 0))]
    choices = [tuple(head) for each in kept for head in each]
    assert len(set(choices)) == len(choices)
    stream = fed(Random(), None, key.expand(3, -1, -1, -1))
    stream.end_prompt()
    assert stream.kept.tolist() == [kept[0]] * 3


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if cls not in (AdaKV, ChunkKV, ChunkKVPress)])
def test_memory_behind_the_cut_is_that_of_what_stays_and_of_the_answer(cls):
    """As the allocator gave it: of the prompt nothing is left but n pairs and 1/32 of spare rows."""
    key = torch.randn(1, 2, 640, 8, generator=torch.Generator().manual_seed(0))
    system = cls(pairs=160, **({"sink_size": 4} if hasattr(cls, "sink_size") else {}))
    stream = fed(system, key[:, :, None], key)
    stream.end_prompt()
    pair = 2 * 2 * 8 * 4
    assert stream.nbytes == 160 * pair
    assert memory(stream) == 165 * pair
    for _ in range(7):
        stream.attend(*[key[:, :, :1]] * 3, 1.0)
    assert stream.nbytes == 167 * pair
    assert memory(stream) <= 167 * pair * 33 / 32


def test_memory_of_unequal_heads_is_that_of_their_pairs():
    key = torch.randn(1, 2, 640, 8, generator=torch.Generator().manual_seed(0))
    key[:, 1] *= 99
    stream = fed(AdaKV(pairs=160, scorer=KeyNorm()), None, key)
    stream.end_prompt()
    sizes = [part.stored[0].shape[2] for part in stream.parts]
    assert sizes == [288, 32]
    assert stream.nbytes == sum(sizes) * 2 * 8 * 4
    assert sum(map(memory, stream.parts)) == sum(size + size // 32 for size in sizes) * 2 * 8 * 4


def test_memory_of_blocks_never_exceeds_the_cache_and_a_block():
    key = torch.randn(1, 2, 640, 8, generator=torch.Generator().manual_seed(0))
    stream = KeyDiffBlocks(pairs=160, block=32).stream(fed(KeyDiff(), None, key).place, "eager")
    pair = 2 * 2 * 8 * 4
    with torch.no_grad():
        for part in key.split(100, dim=2):
            stream.attend(part, part, part, 1.0)
            assert memory(stream) <= (160 + 32) * pair * 33 / 32
    stream.end_prompt()
    assert (stream.nbytes, memory(stream)) == (160 * pair, 165 * pair)


def memory(stream):
    """Bytes that the allocator gave to the stream's keys, values and queries."""
    held = [part for buffer in stream.buffers for part in buffer.whole]
    return sum(part.untyped_storage().nbytes() for part in held)


def test_pairs_of_blocks_are_counted():
    system, seen = KeyDiffBlocks(pairs=5, block=3), []
    for token in range(15):
        seen.append(token + 1 if token < 5 else 5 + (token - 5) % 3 + 1)
    assert [system.attended_pairs(length) for length in range(1, 16)] == [sum(seen[:n]) for n in range(1, 16)]


def test_scorers_are_known_by_name_and_kept_with_their_settings():
    made = System.from_dict({"class_path": "ChunkKVPress", "init_args": {"scorer": "KeyDiff", "size": 4}})
    assert made == ChunkKVPress(scorer=KeyDiff(), size=4)
    assert made.to_dict()["init_args"]["scorer"] == KeyDiff().to_dict()
    assert ChunkKVPress(scorer=ExpectedAttention()).needs_rotary


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: SnapKV(window=0), "window"),
        (lambda: SnapKV(kernel=4), "kernel"),
        (lambda: SnapKV(pooling="sum"), "pooling"),
        (lambda: ExpectedAttention(epsilon=-1), "epsilon"),
        (lambda: ExpectedAttention(future=0), "future"),
        (lambda: LagKVPress(lag_size=1), "lag_size"),
        (lambda: ChunkKV(reuse=0), "reuse"),
        (lambda: ChunkKVPress(size=0), "size"),
        (lambda: ChunkKVPress(scorer=ChunkKV()), "scorer"),
        (lambda: AdaKV(scorer=AdaKV()), "scorer"),
        (lambda: AdaKV(alpha=1.1), "alpha"),
        (lambda: KeyDiffBlocks(pairs=0), "pairs"),
        (lambda: Random(seed=0.5), "seed"),
    ],
)
def test_settings_out_of_bounds_are_refused(make, field):
    with refused(field):
        make()


@pytest.mark.parametrize(("name", "value"), [("kept", 0.25), ("pairs", 9), ("question", True)])
def test_a_scorer_has_no_size_of_its_own(name, value):
    with refused(f"scorer.init_args.{name}", value, reason="is not used; set it in ChunkKVPress"):
        ChunkKVPress(scorer=KeyNorm(**{name: value}))
