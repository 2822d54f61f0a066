"""What is captured is what the operator keeps, by an oracle on the keys and values of an ordinary cache."""

import numpy as np
import pytest
import torch
from helpers import oracle_kept, refused
from transformers import DynamicCache

from lrsa_lit.analysis.capture import capture, record, shape_digest
from lrsa_lit.attention import LRSAConfig, enable, enabled_config, observing, using
from lrsa_lit.data.collate import collate
from lrsa_lit.models.tiny import tiny_model, tiny_tokenizer
from lrsa_lit.ops.sparse_attention import MeanPool, RandomTokens

RULE = LRSAConfig(sink_size=2, lag_size=8, top_k=3)
LENGTHS = (70, 40, 11)


def model(rule=RULE):
    return enable(tiny_model(num_layers=3, hidden_size=32).double().eval(), rule)


def tokens(*lengths):
    return [torch.randint(3, 259, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]


def padded(rows, side):
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True, padding_side=side)
    return {"input_ids": ids, "attention_mask": mask}


def expected(rule, row):
    """Kept positions of each layer and head, from the rotated keys that a dense cache of the same model holds."""
    cache = DynamicCache()
    with torch.no_grad():
        model(rule)(row[None], past_key_values=cache)
    return [
        None
        if index in rule.dense_layers
        else [oracle_kept(key, value, rule) for key, value in zip(layer.keys[0], layer.values[0], strict=True)]
        for index, layer in enumerate(cache.layers)
    ]


def kept(captured):
    return [None if layer is None else layer.positions.tolist() for layer in captured.layers.values()]


def check(forward, rule, rows):
    assert [captured.length for captured in forward] == [len(row) for row in rows]
    for captured, row in zip(forward, rows, strict=True):
        assert kept(captured) == expected(rule, row)


@pytest.mark.parametrize(
    "rule",
    [
        RULE,
        RULE.replace(dense_layers=(0, 2)),
        RULE.replace(chunk_size=5, top_k=8),
        RULE.replace(sink_size=0, top_k=0, value_weight=0.0),
    ],
    ids=["plain", "dense-layers", "chunks-of-5", "nothing-kept"],
)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_rows_are_recorded_as_if_alone(rule, side):
    rows = tokens(*LENGTHS)
    under = model(rule)
    with capture(under) as found:
        under(**padded(rows, side))
    (forward,) = found.forwards
    check(forward, rule, rows)


@torch.no_grad()
def test_equal_rows_packed_rows_and_a_continued_cache():
    under, (a, b), packed = model(), tokens(50, 51), tokens(30, 45)
    b = b[:50]
    positions = torch.cat([torch.arange(len(row)) for row in packed])[None]
    cache = DynamicCache()
    with capture(under) as found:
        under(torch.stack([a, b]), use_cache=False)
        under(torch.cat(packed)[None], position_ids=positions, use_cache=False)
        under(a[None, :33], past_key_values=cache)
        under(a[None, 33:], past_key_values=cache)
    batch, pack, begun, continued = found.forwards
    check(batch, RULE, [a, b])
    check(pack, RULE, packed)
    check(begun, RULE, [a[:33]])
    check(continued, RULE, [a])


@torch.no_grad()
def test_scores_are_those_of_the_kept_tokens():
    rule = RULE.replace(compressor=RandomTokens(seed=5))
    (row,) = tokens(60)
    under = model(rule)
    with capture(under) as found:
        under(row[None])
    for index, layer in found.forwards[0][0].layers.items():
        compressor = rule.layers.of(index).compressor
        assert layer.scores.shape == layer.positions.shape == (2, 6, 3)
        # A random score depends on head, partition and place alone, so it can be asked for again.
        shape = torch.zeros(1, 2, 6, 8, 1)
        partitions = type("P", (), {"key": shape, "first": 0})()
        every = compressor.score(partitions)[0].numpy()
        places = (layer.positions - rule.sink_size) % rule.lag_size
        np.testing.assert_array_equal(layer.scores, np.take_along_axis(every, places, axis=-1).astype(np.float32))


@torch.no_grad()
def test_logits_do_not_change_and_nothing_is_left_behind():
    under, batch = model(), padded(tokens(*LENGTHS), "right")
    before, name = under(**batch).logits, under.config._attn_implementation
    with capture(under) as found:
        torch.testing.assert_close(under(**batch).logits, before, rtol=0, atol=0)
    assert under.config._attn_implementation == name
    torch.testing.assert_close(under(**batch).logits, before, rtol=0, atol=0)
    assert len(found.forwards) == 1, "a forward behind the block was recorded"


def test_everything_is_restored_after_an_error():
    under = model()
    name = under.config._attn_implementation
    with pytest.raises(RuntimeError, match="mine"), capture(under):
        raise RuntimeError("mine")
    assert under.config._attn_implementation == name
    assert enabled_config(under) == RULE


@torch.no_grad()
def test_blocks_may_stand_within_each_other():
    under, (row,) = model(), tokens(40)
    with capture(under) as outer:
        under(row[None])
        with capture(under) as inner:
            under(row[None])
        under(row[None])
    assert (len(outer.forwards), len(inner.forwards)) == (2, 1)


def test_gradient_checkpointing_is_recorded_once():
    under, (row,) = model(), tokens(40)
    under.train()
    under.gradient_checkpointing_enable({"use_reentrant": False})
    calls = []
    with observing(under, lambda rule, *_: calls.append(rule.layer)):
        under(row[None], use_cache=False).logits.sum().backward()
    assert sorted(calls) == [0, 0, 1, 1, 2, 2]
    with capture(under) as found:
        under(row[None], use_cache=False).logits.sum().backward()
    (forward,) = found.forwards
    check(forward, RULE, [row])


@torch.no_grad()
def test_autocast_shows_what_the_operator_is_given():
    under, (row,) = model().float(), tokens(40)
    seen = set()
    with torch.autocast("cpu", torch.bfloat16), observing(under, lambda *args: seen.update(x.dtype for x in args[2:])):
        under(row[None])
    assert seen == {torch.bfloat16}


@pytest.mark.parametrize(
    ("rule", "field"),
    [
        (RULE.replace(compressor=MeanPool()), "compressor"),
        (RULE.replace(dense_layers=(0, 1, 2)), "dense_layers"),
        (None, "model"),
    ],
)
def test_models_that_select_nothing(rule, field):
    under = tiny_model(num_layers=3, hidden_size=32) if rule is None else model(rule)
    with refused(field), capture(under):
        raise AssertionError("the block must not run")


@torch.no_grad()
def test_what_a_block_may_not_do():
    under, (row,) = model(), tokens(40)
    with refused("model", reason="switched"), capture(under), using(under, RULE.replace(top_k=2)):
        under(row[None])
    assert enabled_config(under) == RULE
    assert under(row[None]).logits.isfinite().all()


def batch(*lengths):
    examples = [
        {
            "id": f"q{n}",
            "input_ids": [*row.tolist(), 7, 8],
            "prompt_length": n,
            "gold_spans": [(3, 9)],
            "answer_spans": [(4, 6)],
            "answers": ["an answer"],
            "match": "any",
        }
        for n, row in zip(lengths, tokens(*lengths), strict=True)
    ]
    return collate(examples, pad_token_id=2)


def test_record_of_batches():
    under = model()
    under.train()
    made = record(under, [batch(70, 40), batch(33)], tiny_tokenizer(), name="tiny", step=3)
    assert under.training
    assert (made.model, made.step, made.rule) == ("tiny", 3, RULE.to_dict())
    assert [(s.id, len(s.token_ids), s.gold_spans, s.answer_spans) for s in made.samples] == [
        (f"q{n}", n, ((3, 9),), ((4, 6),)) for n in (70, 40, 33)
    ]
    for sample, row in zip(made.samples, tokens(70, 40, 33), strict=True):
        assert sample.token_ids.tolist() == row.tolist()
        assert sample.positions.tolist() == expected(RULE, row)
    assert set(made.texts) == {int(token) for row in tokens(70, 40, 33) for token in row}
    assert made.texts[int(tokens(70)[0][0])] == tiny_tokenizer().decode([int(tokens(70)[0][0])])


def test_digest_tells_shapes_apart():
    digests = [shape_digest(tiny_model(**sizes).config) for sizes in ({}, {"num_layers": 3}, {"num_kv_heads": 1})]
    assert len(set(digests)) == 3
    assert digests[0] == shape_digest(model().float().config.__class__(**tiny_model(seed=4).config.to_dict()))
