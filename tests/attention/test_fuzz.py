"""A few sequences of ``benchmarks/fuzz_cache.py``: random calls on a cache, with exceptions thrown in."""

import fuzz_cache
import pytest

from lrsa_lit.attention import LRSACache


@pytest.mark.parametrize("seed", range(1000, 1008))
def test_every_call_is_right_or_refused_after_an_exception(seed):
    fuzz_cache.Sequence(seed).run(steps=10)


def test_a_cache_that_is_no_longer_checked_is_found_out(monkeypatch):
    own = LRSACache.begin

    def unchecked(self, *args):
        self._busy = None
        for layer in self.layers:
            layer._columns, layer._step = self.layers[0]._columns, "idle"
        own(self, *args)

    monkeypatch.setattr(LRSACache, "begin", unchecked)
    monkeypatch.setattr(fuzz_cache.Sequence, "piece", fuzz_cache.Sequence.interrupt)
    counts = sum((fuzz_cache.run_sequence(seed, 10) for seed in range(6)), fuzz_cache.Counter())
    assert counts["silent"] + counts["tracebacks"] > 0
