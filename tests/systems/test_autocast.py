"""Under autocast, attention gets tensors of its dtype, and computes in those dtypes that it asks for."""

from dataclasses import dataclass

import torch

from lrsa_lit.attention import LRSACache, LRSAConfig, cache_argument, read_prompts, using
from lrsa_lit.attention.decoding import Decoder
from lrsa_lit.ops.sparse_attention import KeyValueStream, MeanPool
from lrsa_lit.systems import OneShot, SqueezedAttention, System


def product_of(query):
    """The dtype of a product of float32 and that of queries."""
    one = torch.ones(1, 1)
    return (one @ one).dtype, query.dtype


@dataclass(frozen=True)
class Watched(System):
    """A dense one that tells what it sees."""

    def attend(self, query, key, value, **options):
        SEEN.add(product_of(query))
        return super().attend(query, key, value, **options)

    def stream(self, place, impl):
        class Stream(KeyValueStream):
            def attend(self, query, key, value, scale):
                SEEN.add(product_of(query))
                return super().attend(query, key, value, scale)

        return Stream(None, impl)


SEEN = set()


def test_products_of_float32_stay_float32(model, ids):
    model = type(model)(model.config).eval()
    with using(model, LRSAConfig(system=Watched())), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(ids(1, 5))
        cache = LRSACache.of(model)
        model(ids(1, 5), use_cache=True, **cache_argument(model, cache))
        assert {(torch.float32, torch.bfloat16)} == SEEN
        assert product_of(torch.ones(1))[0] == torch.bfloat16, "what the model does around it goes on as it was"


@dataclass(frozen=True)
class WatchedCut(OneShot):
    """Tells what it sees where a prompt ends."""

    def scores(self, prompt):
        CUT.add(product_of(prompt.key)[0])
        return prompt.key.float().norm(dim=-1)


CUT = set()


def test_products_at_the_end_of_a_prompt_stay_float32(model, ids):
    model = type(model)(model.config).eval()
    with using(model, LRSAConfig(system=WatchedCut())), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        read_prompts(model, LRSACache.of(model), ids(2, 9))
    assert {torch.float32} == CUT


@dataclass(frozen=True)
class WatchedMeans(MeanPool):
    """Tells what it sees where a partition is compressed."""

    def compress(self, partitions):
        COMPRESSED.add(product_of(partitions.key)[0])
        return super().compress(partitions)


COMPRESSED = set()


def test_products_between_the_steps_of_a_decoder_stay_float32(model, ids):
    model = type(model)(model.config).eval()
    rule = LRSAConfig(sink_size=1, lag_size=4, top_k=2, compressor=WatchedMeans())
    with using(model, rule), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cache = LRSACache.of(model)
        read_prompts(model, cache, ids(2, 8))
        assert not COMPRESSED
        step = Decoder(model, cache, room=4).step
        for token in ids(2, 4).split(1, dim=1):
            step(token)
    assert {torch.float32} == COMPRESSED


def test_squeezed_attention_runs_under_autocast(model, ids):
    model = type(model)(model.config).eval()
    system = SqueezedAttention(observed=4, clusters=0.3)
    with using(model, LRSAConfig(system=system)), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits, _ = read_prompts(model, LRSACache.of(model), ids(2, 20))
    assert logits.isfinite().all()
