"""Systems of one cut are held to recorded runs of their definitions: the same scores, and the same pairs stay."""

import pytest
import torch
from systems.recorded import CALLS, ROTARY, cut, fed, inputs, rotated, vectors

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
    SnapKV,
    StreamingLLM,
)

pytestmark = pytest.mark.parametrize("calls", CALLS)
SNAP = {"window": 3, "kernel": 3}


def assert_scores(system, tensors, expected, calls):
    scores = system.scores(fed(system, *tensors, calls=calls).prompt())
    torch.testing.assert_close(scores[0], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=2e-8)


def attended(name):
    """Rotated queries and keys."""
    query, key, value = inputs(name)
    return rotated(query), rotated(key), value


def test_snapkv(calls):
    expected, tensors = vectors("snapkv")["expected"], attended("snapkv")
    assert_scores(SnapKV(**SNAP), tensors, expected["kvpress_scores"], calls)
    for removed, kept in expected["kvpress_kept"].items():
        assert cut(SnapKV(1 - float(removed), **SNAP), *tensors, calls=calls) == kept


def test_tova(calls):
    expected, tensors = vectors("tova")["expected"], attended("tova")
    scores = TOVA().scores(fed(TOVA(), *tensors, calls=calls).prompt())[0]
    # The recorded softmax is in float32.
    torch.testing.assert_close(scores, torch.tensor(expected["scores"], dtype=torch.float64), rtol=0, atol=1e-7)
    for removed, kept in expected["kept"].items():
        assert cut(TOVA(1 - float(removed)), *tensors, calls=calls) == kept


def test_expected_attention(calls):
    expected, tensors = vectors("expected_attention")["expected"], attended("expected_attention")
    options = {"sink_size": 2, "future": 8}
    assert_scores(ExpectedAttention(**options), tensors, expected["scores"], calls)
    assert_scores(ExpectedAttention(**options, epsilon=0.02), tensors, expected["scores_eps_0_02"], calls)
    assert cut(ExpectedAttention(**options), *tensors, calls=calls) == expected["kept"]


def test_keydiff(calls):
    expected, (_, key, _) = vectors("keydiff")["expected"], inputs("keydiff")
    assert_scores(KeyDiff(), (None, key), expected["scores"], calls)
    assert cut(KeyDiff(), None, key, calls=calls) == expected["kept"]
    stream = fed(KeyDiffBlocks(pairs=8, block=3), None, key, calls=calls)
    stream.end_prompt()
    for head, kept in enumerate(expected["kept_blocks"]):
        assert torch.equal(stream.stored[0][0, head], key[0, head, kept])


def test_lagkv_press(calls):
    expected, (_, key, value) = vectors("lagkv_press")["expected"], inputs("lagkv_press")
    options = {"sink_size": 1, "lag_size": 3}
    assert_scores(LagKVPress(**options), (None, key, value), expected["kvpress_scores"], calls)
    for removed, kept in expected["kvpress_kept"].items():
        assert cut(LagKVPress(1 - float(removed), **options), None, key, value, calls=calls) == kept
    cross = LagKVPress(**options, cross_scoring=True)
    assert_scores(cross, (None, key, value), expected["cross_scores"], calls)
    assert cut(cross, None, key, value, calls=calls) == expected["cross_kept_0_5"]
    short = None, key[:, :, :6], value[:, :, :6]
    assert_scores(LagKVPress(**options), short, expected["short_T6_scores"], calls)
    assert cut(LagKVPress(**options), *short, calls=calls) == expected["short_T6_kept_0_5"]


def test_lagkv_press_at_a_matched_budget_is_the_published_cache(calls):
    """Sinks, K of each partition and the tail, as LRSA's rule keeps them of the same keys."""
    expected, (_, key, value) = vectors("lagkv_press")["expected"], inputs("lagkv_press")
    assert cut(LagKVPress(sink_size=1, lag_size=3), None, key, value, calls=calls) == expected["published_kept"]


def test_key_norm_and_streaming_llm(calls):
    expected, (_, key, _) = vectors("knorm")["expected"], inputs("knorm")
    assert_scores(KeyNorm(), (None, key), expected["scores"], calls)
    for removed, kept in expected["kept"].items():
        assert cut(KeyNorm(1 - float(removed)), None, key, calls=calls) == kept
    for case in vectors("streaming_llm")["expected"]:
        system = StreamingLLM(pairs=len(case["kept"]), sink_size=case["n_sink"])
        assert cut(system, None, torch.ones(1, 2, case["tokens"], 4), calls=calls) == [case["kept"]] * 2


def test_chunkkv_press(calls):
    expected, tensors = vectors("chunkkv")["expected"], attended("chunkkv")
    assert_scores(ChunkKVPress(scorer=SnapKV(**SNAP)), tensors, expected["snapkv_scores"], calls)
    for removed, found in expected["kvpress"].items():
        system = ChunkKVPress(1 - float(removed), scorer=SnapKV(**SNAP), size=4)
        assert cut(system, *tensors, calls=calls) == [found["kept"]] * 2


def test_chunkkv_of_the_paper(calls):
    expected, tensors = vectors("chunkkv")["expected"], attended("chunkkv")
    system = ChunkKV(pairs=8, size=4, window=3)
    assert cut(system, *tensors, calls=calls) == [expected["paper_shared"]["kept"]] * 2
    for head, found in enumerate(expected["paper_per_head"]):
        alone = (x[:, head : head + 1] for x in tensors[:2])
        assert cut(system, *alone, calls=calls) == [found["kept"]]


def test_layers_reuse_the_choice_of_the_first_of_their_group(calls):
    expected, tensors = vectors("chunkkv")["expected"], attended("chunkkv")
    sources = expected["layer_reuse"]["source_layer"]
    system = ChunkKV(pairs=8, size=4, window=3, reuse=expected["layer_reuse"]["N_reuse"])
    # In each layer the tokens of the prompt, and so the choice, are other ones.
    of_layers = [tuple(x.roll(5 * layer, dims=-2) for x in tensors[:2]) for layer in range(len(sources))]
    streams = [fed(system, *given, calls=calls, layer=layer) for layer, given in enumerate(of_layers)]
    system.end_prompt(streams)
    alone = [cut(system, *given, calls=calls) for given in of_layers]
    assert alone[0] != alone[1]
    assert [stream.kept[0].tolist() for stream in streams] == [alone[source] for source in sources]


ADAKV_SCORERS = {
    "snapkv": SnapKV(**SNAP),
    "expected_attention": ExpectedAttention(sink_size=2, future=8, epsilon=0.02),
    "lagkv_cross": LagKVPress(sink_size=1, lag_size=3, cross_scoring=True),
    "knorm": KeyNorm(),
}


@pytest.mark.parametrize("name", ADAKV_SCORERS)
def test_adakv(calls, name):
    expected, tensors = vectors("adakv")["expected"], attended("adakv")
    assert_scores(ADAKV_SCORERS[name], tensors, expected[name]["scores"], calls)
    for case in expected[name]["cases"]:
        system = AdaKV(pairs=case["n_kept"], scorer=ADAKV_SCORERS[name], alpha=case["alpha"])
        kept = cut(system, *tensors, calls=calls)
        assert [[place for place in head if place >= 0] for head in kept] == case["kept"]


def test_the_next_token_sees_what_adakv_keeps(calls):
    tokens, expected = attended("adakv"), vectors("adakv")["decode"]
    query, key, value = (torch.tensor(expected[x], dtype=torch.float64)[None] for x in "qkv")
    stream = fed(AdaKV(0.5, scorer=SnapKV(**SNAP)), *tokens, calls=calls)
    stream.end_prompt()
    query, key = (ROTARY.rotate(x[..., None, :], [14]) for x in (query, key))
    output = stream.attend(query.flatten(1, 2), key, value[:, :, None], 0.5)
    torch.testing.assert_close(
        output.view(2, 2, 4), torch.tensor(expected["out"], dtype=torch.float64), rtol=0, atol=1e-7
    )
    assert sum(part.stored[0].shape[1:3].numel() for part in stream.parts) == 2 * (7 + 1)
