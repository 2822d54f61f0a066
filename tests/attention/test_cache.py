"""The compressed cache under bare forward calls: what it holds, how it continues, what it refuses."""

import pytest
import torch
from helpers import refused
from transformers import StaticCache

from lrsa_lit.attention import LRSACache, cache_argument, disable, enable, using
from lrsa_lit.ops.sparse_attention import KeyValueStream, eager, stored_size


@pytest.fixture(scope="module")
def model(tiny, rule):
    return enable(tiny("Llama"), rule)


@torch.no_grad()
def feed(model, cache, ids, sizes, mask=None):
    """Logits of the columns, taken in call by call."""
    parts, start = [], 0
    for size in sizes:
        given = {} if mask is None else {"attention_mask": mask[:, : start + size]}
        parts.append(model(ids[:, start : start + size], past_key_values=cache, **given).logits)
        start += size
    assert start == ids.shape[1]
    return torch.cat(parts, dim=1)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


SPLITS = {"at-once": [90], "odd": [1, 17, 1, 40, 31], "decode": [60] + [1] * 30}


@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("family", ["Llama", "GPTNeoX", "Qwen3", "SmolLM3"])
def test_any_split_gives_the_parallel_pass(family, sizes, tiny, tokens, rule):
    model, ids = enable(tiny(family), rule), tokens(2, 90)
    cache = LRSACache(rule, 3)
    close(feed(model, cache, ids, sizes), model(ids, use_cache=False).logits)
    assert cache.stored_tokens() == [2 * stored_size(90, rule.rule)] * 3
    assert cache.get_seq_length() == 90


@pytest.mark.parametrize("by_place", [False, True], ids=["keyword", "place"])
@pytest.mark.filterwarnings("error::FutureWarning")
def test_the_cache_is_taken_under_the_name_that_transformers_has_now(by_place, model, tokens, rule):
    cache, ids, parts = LRSACache(rule, 3), tokens(1, 70), []
    for part in ids.split(35, dim=1):
        output = model(part, None, None, cache) if by_place else model(part, **cache_argument(model, cache))
        parts.append(output.logits)
    close(torch.cat(parts, dim=1), model(ids, use_cache=False).logits)
    assert cache.stored_tokens() == [stored_size(70, rule.rule)] * 3


def test_dense_layers_hold_everything(tiny, tokens, rule):
    config, ids = rule.replace(dense_layers=(1,)), tokens(2, 90)
    model, cache = enable(tiny("Llama"), config), LRSACache(config, 3)
    close(feed(model, cache, ids, [50, 1, 39]), model(ids, use_cache=False).logits)
    sparse = 2 * stored_size(90, rule.rule)
    assert cache.stored_tokens() == [sparse, 2 * 90, sparse]


LENGTHS = [90, 33, 7, 60]


def padded(tokens, starts=None):
    """Rows of unequal lengths, left-padded to 90 columns unless told where they start."""
    ids, mask = torch.full((4, 90), 33), torch.zeros(4, 90, dtype=torch.long)
    sequences = [tokens(1, length, seed=length) for length in LENGTHS]
    starts = starts or [90 - length for length in LENGTHS]
    for row, sequence in enumerate(sequences):
        ids[row, starts[row] : starts[row] + LENGTHS[row]] = sequence
        mask[row, starts[row] : starts[row] + LENGTHS[row]] = 1
    return ids, mask, sequences, starts


@pytest.mark.parametrize("sizes", [*SPLITS.values(), [40, 50]], ids=[*SPLITS, "row-starts-later"])
def test_left_padded_rows_get_what_each_gets_alone(sizes, model, tokens, rule):
    ids, mask, sequences, starts = padded(tokens)
    cache = LRSACache(rule, 3)
    logits = feed(model, cache, ids, sizes, mask)
    for row, sequence in enumerate(sequences):
        close(logits[row, None, starts[row] :], model(sequence, use_cache=False).logits)
    assert logits.isfinite().all()
    assert cache.stored_tokens() == [sum(stored_size(length, rule.rule) for length in LENGTHS)] * 3, "no pad is stored"


@pytest.mark.parametrize("pads", ["left", "right"])
def test_rows_are_compressed_and_attended_to_together(pads, tiny, tokens, rule, monkeypatch):
    """Also a row of one token, one shorter than the sinks, and one of pads alone, which begins in the second call."""
    lengths, first, continued = [90, 1, 33, 0, 7], [], []
    config = rule.replace(sink_size=9, dense_layers=(1,))
    model = enable(tiny("Llama", dtype=torch.float32), config)
    sequences = [tokens(1, length, seed=length) for length in lengths]
    ids, mask = torch.full((5, 90), 33), torch.zeros(5, 90, dtype=torch.long)
    for row, length in enumerate(lengths):
        place = slice(90 - length, 90) if pads == "left" else slice(0, length)
        ids[row, place], mask[row, place] = sequences[row][0], 1
    start, go_on, step = eager.forward_and_compact, eager.attend_rows, KeyValueStream.attend

    def starting(*args, boundaries, **options):
        first.append(boundaries)
        return start(*args, boundaries=boundaries, **options)

    def going_on(query, rows, *args, **options):
        continued.append([row.tokens for row in rows])
        return go_on(query, rows, *args, **options)

    monkeypatch.setattr(eager, "forward_and_compact", starting)
    monkeypatch.setattr(eager, "attend_rows", going_on)
    monkeypatch.setattr(KeyValueStream, "attend", None)
    cache, more = LRSACache(config, 3), tokens(5, 31, seed=1)
    logits, later = feed(model, cache, ids, [90], mask), feed(model, cache, more, [31])
    assert first == [[0, 90, 91, 124, 131]] * 3, "once in each layer"
    assert continued == [[length + 31 for length in lengths]] * 3
    monkeypatch.setattr(KeyValueStream, "attend", step)
    for row, sequence in enumerate(sequences):
        alone = LRSACache(config, 3)
        if lengths[row]:
            place = slice(90 - lengths[row], 90) if pads == "left" else slice(0, lengths[row])
            wanted = feed(model, alone, sequence, [lengths[row]])
            torch.testing.assert_close(logits[row, None, place], wanted, rtol=0, atol=1e-4)
        wanted = feed(model, alone, more[row, None], [31])
        torch.testing.assert_close(later[row, None], wanted, rtol=0, atol=1e-4)
        for layer, other in zip(cache.layers, alone.layers, strict=True):
            (mine,), (theirs,) = layer.streams[row].parts, other.streams[0].parts
            for got, pair in zip(mine.stored, theirs.stored, strict=True):
                torch.testing.assert_close(got, pair, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "spans", [[(0, 40), (13, 40)], [(0, 40), (0, 29)], [(5, 40)] * 2], ids=["left", "right", "alike"]
)
def test_calls_without_a_mask_count_no_pads(spans, model, tokens, rule):
    ids, cache, mask = tokens(2, 90), LRSACache(rule, 3), torch.zeros(2, 40, dtype=torch.long)
    for row, (start, stop) in enumerate(spans):
        mask[row, start:stop] = 1
    feed(model, cache, ids[:, :40], [40], mask)
    continued = feed(model, cache, ids[:, 40:], [1] * 9 + [20, 21])
    for row, (start, stop) in enumerate(spans):
        alone = torch.cat([ids[row, start:stop], ids[row, 40:]])[None]
        close(continued[row, None], model(alone, use_cache=False).logits[:, -50:])


@pytest.mark.parametrize("sizes", [[40, 50], [60] + [1] * 30], ids=["two-calls", "decode"])
def test_left_padded_rows_over_an_uncompressed_cache(sizes, model, tokens):
    ids, mask, sequences, starts = padded(tokens)
    cache, parts, start = None, [], 0
    for size in sizes:
        given = {"attention_mask": mask[:, : start + size], "use_cache": True}
        with torch.no_grad():
            output = model(ids[:, start : start + size], past_key_values=cache, **given)
        cache, start = output.past_key_values, start + size
        parts.append(output.logits)
    logits = torch.cat(parts, dim=1)
    for row, sequence in enumerate(sequences):
        close(logits[row, None, starts[row] :], model(sequence, use_cache=False).logits)
    assert logits.isfinite().all()


def test_a_turn_of_right_padded_rows_is_continued_without_the_pads(model, tokens, rule):
    ids, mask, sequences, _ = padded(tokens, starts=[0, 0, 0, 0])
    cache, more = LRSACache(rule, 3), tokens(4, 25, seed=1)
    logits = feed(model, cache, torch.cat([ids, more], dim=1), [90, 20, 5],
                  torch.cat([mask, torch.ones_like(more)], dim=1))  # fmt: skip
    for row, sequence in enumerate(sequences):
        whole = model(torch.cat([sequence, more[row, None]], dim=1), use_cache=False).logits
        close(logits[row, None, 90:], whole[:, -25:])
    assert cache.stored_tokens() == [sum(stored_size(length + 25, rule.rule) for length in LENGTHS)] * 3


def test_rows_padded_alike_share_a_stream(model, tokens, rule):
    ids, mask = tokens(3, 80), torch.ones(3, 80, dtype=torch.long)
    mask[:, :6] = 0
    cache = LRSACache(rule, 3)
    close(feed(model, cache, ids, [50, 30], mask)[:, 6:], model(ids[:, 6:], use_cache=False).logits)
    assert all(len(layer.streams) == 1 for layer in cache.layers)
    assert cache.stored_tokens() == [3 * stored_size(74, rule.rule)] * 3


def test_a_row_of_pads_alone_stores_nothing(model, tokens, rule):
    ids, mask, _, _ = padded(tokens)
    mask[2] = 0
    cache = LRSACache(rule, 3)
    logits = feed(model, cache, ids, [50, 40], mask)
    assert logits.isfinite().all()
    lengths = [length for row, length in enumerate(LENGTHS) if row != 2]
    assert cache.stored_tokens() == [sum(stored_size(length, rule.rule) for length in lengths)] * 3


def test_reset_starts_again(model, tokens, rule):
    cache, ids = LRSACache(rule, 3), tokens(2, 70)
    feed(model, cache, tokens(2, 40, seed=1), [40])
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.stored_tokens() == [0, 0, 0]
    close(feed(model, cache, ids[:1], [30, 40]), model(ids[:1], use_cache=False).logits)


@pytest.mark.parametrize("padding", [False, True], ids=["equal", "unequal"])
def test_rows_are_repeated_reordered_and_selected(padding, model, tokens, rule):
    ids, mask = tokens(2, 60), torch.ones(2, 60, dtype=torch.long)
    mask[1, :20] = 0 if padding else 1
    cache, more = LRSACache(rule, 3), tokens(4, 30, seed=1)
    feed(model, cache, ids, [60], mask)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
    rows = [1, 0, 0, 1]
    full = torch.cat([mask[rows], torch.ones_like(more)], dim=1)
    with torch.no_grad():
        logits = model(more, attention_mask=full, past_key_values=cache).logits
        for row, source in enumerate(rows):
            sequence = torch.cat([ids[source, None, mask[source] == 1], more[row, None]], dim=1)
            close(logits[row, None], model(sequence, use_cache=False).logits[:, -30:])
    cache.batch_select_indices(torch.tensor([2]))
    length = int(mask[0].sum()) + 30
    assert cache.stored_tokens() == [stored_size(length, rule.rule)] * 3


def test_another_batch_size_is_refused(model, tokens, rule):
    cache = LRSACache(rule, 3)
    feed(model, cache, tokens(2, 20), [20])
    for rows in (1, 3):
        with refused("cache", reason=f"continue {rows}"):
            model(tokens(rows, 5), past_key_values=cache)


@pytest.mark.parametrize("used_before", [False, True], ids=["new", "used-before"])
def test_a_plain_model_is_refused(used_before, tiny, tokens, rule):
    model, cache = tiny("Llama"), LRSACache(rule, 3)
    if used_before:
        enable(model, rule)(tokens(1, 30), past_key_values=cache)
        disable(model)
    with refused("cache", reason="needs a model with LRSA"):
        model(tokens(1, 5), past_key_values=cache)


def test_a_cache_of_another_rule_or_model_is_refused(model, tokens, rule):
    for cache in (LRSACache(rule.replace(top_k=2), 3), LRSACache(rule, 2), LRSACache(rule, 4)):
        with refused("past_key_values", reason=f" {len(cache.layers)} layers"):
            model(tokens(1, 5), past_key_values=cache)


def test_a_cache_follows_the_rule_that_a_block_uses(model, tokens, rule):
    other, ids = rule.replace(top_k=1), tokens(1, 70)
    cache = LRSACache(other, 3)
    with using(model, other):
        close(feed(model, cache, ids, [30, 40]), model(ids, use_cache=False).logits)


def test_cropping_is_refused(model, tokens, rule):
    cache = LRSACache(rule, 3)
    feed(model, cache, tokens(1, 40), [40])
    with refused("cache", reason="crop"):
        cache.crop(1)


@pytest.mark.parametrize("padding", [False, True], ids=["unpadded", "padded"])
@pytest.mark.parametrize("past", [0, 9], ids=["first-call", "later-call"])
def test_packed_sequences_cannot_be_cached(padding, past, model, tokens, rule):
    cache, mask = LRSACache(rule, 3), torch.ones(2, past + 12, dtype=torch.long)
    if past:
        feed(model, cache, tokens(2, past), [past])
    if padding:
        mask[0] = 0
    positions = torch.tensor([[*range(past, past + 5), *range(7)]]).expand(2, -1)
    given = {"attention_mask": mask, "position_ids": positions}
    with refused("position_ids"):
        model(tokens(2, 12), past_key_values=cache, **given)


@pytest.mark.parametrize("pads_from", [32, 0, 20], ids=["unpadded", "row-of-pads", "row-that-ended"])
def test_packed_sequences_cannot_continue_an_uncompressed_cache(pads_from, model, tokens):
    mask = torch.ones(2, 32, dtype=torch.long)
    mask[0, pads_from:] = 0
    cache = model(tokens(2, 20), attention_mask=mask[:, :20], use_cache=True).past_key_values
    positions = torch.tensor([[*range(20, 25), *range(7)]]).expand(2, -1)
    given = {"attention_mask": mask, "position_ids": positions}
    with refused("position_ids"):
        model(tokens(2, 12), past_key_values=cache, **given)


def test_static_caches_are_refused(model, tokens):
    cache = StaticCache(config=model.config, max_cache_len=64)
    with refused("past_key_values", reason="static"):
        model(tokens(1, 5), past_key_values=cache)


def test_a_mask_of_the_new_columns_alone_is_refused(model, tokens, rule):
    cache = LRSACache(rule, 3)
    feed(model, cache, tokens(2, 20), [20])
    mask = torch.ones(2, 5, dtype=torch.long)
    with refused("attention_mask"):
        model(tokens(2, 5), attention_mask=mask, past_key_values=cache)


def test_what_it_shows_of_itself(model, tokens, rule):
    cache, ids = LRSACache(rule, 3), tokens(2, 90)
    assert repr(cache) == "LRSACache(empty, 3 layers, LagRelative)"
    mask = torch.ones_like(ids)
    mask[1, :30] = 0
    feed(model, cache, ids, [90])
    kept = stored_size(90, rule.rule)
    share = f"{kept / 90:.0%}"
    assert repr(cache) == f"LRSACache(90 tokens seen, {kept} kept per head ({share}), 2 rows, 3 layers, LagRelative)"
    cache.reset()
    feed(model, cache, ids, [90], mask)
    assert repr(cache).startswith("LRSACache(75 tokens seen, ")
