"""Records made by hand and by chance, without a model."""

import numpy as np
import pytest

from lrsa_lit.analysis.record import Sample, SelectionRecord
from lrsa_lit.attention import LRSAConfig
from lrsa_lit.ops.sparse_attention import compressed_at

WORDS = [" the", " Isk", " is", " 2", "12", " km", ".", " Then", " a", "\n", "river", " ran", ",", " Ös", "tra", " "]
RULE = LRSAConfig(sink_size=2, lag_size=8, top_k=3)


def chosen(
    lengths=(70, 40),
    *,
    rule=RULE,
    layers=3,
    heads=2,
    seed=0,
    gold=((4, 20), (30, 36)),
    answer=((6, 8), (7, 9)),
    model="tiny",
    digest="0123456789ab",
    step=0,
    token_seed=0,
) -> SelectionRecord:
    """A record of K tokens drawn at random from each partition."""
    draw, text = np.random.default_rng(seed), np.random.default_rng(token_seed)
    compressed = [layer for layer in range(layers) if layer not in rule.dense_layers]
    samples = []
    for number, length in enumerate(lengths):
        count = compressed_at(length - 1, rule.rule)
        starts = rule.sink_size + rule.lag_size * np.arange(count)
        places = np.argsort(draw.random((len(compressed), heads, count, rule.lag_size)), axis=-1)[..., : rule.top_k]
        positions = (np.sort(places, axis=-1) + starts[:, None]).astype(np.int32)
        scores = draw.random(positions.shape).astype(np.float32)
        tokens = text.integers(0, len(WORDS), length).astype(np.int32)
        spans = [tuple((a, min(b, length)) for a, b in group if a < length) for group in (gold, answer)]
        samples.append(Sample(f"q{number}", tokens, *spans, positions, scores))
    return SelectionRecord(tuple(samples), rule.to_dict(), model, digest, step, dict(enumerate(WORDS)), compressed)


@pytest.fixture(scope="session")
def drawn():
    return chosen
