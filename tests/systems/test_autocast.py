"""Under autocast, attention gets tensors of its dtype, and computes in those dtypes that it asks for."""

from dataclasses import dataclass

import torch

from lrsa_lit.attention import LRSACache, LRSAConfig, cache_argument, using
from lrsa_lit.ops.sparse_attention import KeyValueStream
from lrsa_lit.systems import System


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
