"""The recorded runs of the published cache: what each query saw, what was stored, what was kept."""

import pytest
import torch
from helpers import oracle_mask, partitions_compressed, recorded
from visible import visible_keys

from lrsa_lit.ops.sparse_attention import Rule, select
from lrsa_lit.ops.sparse_attention.geometry import attended_pairs, compressed_at, stored_size

NAMES = [f"visibility_{n}" for n in range(7)]


@pytest.mark.parametrize("name", NAMES)
def test_every_query_sees_what_the_published_cache_showed_it(name):
    run = recorded(name)
    config = Rule(**run.params)
    mask = visible_keys(run.key, run.value, config)[0]
    assert int((mask != run.visible).sum()) == 0
    assert (run.visible != torch.ones_like(run.visible).tril()).any(), "a run that drops nothing proves nothing"


@pytest.mark.parametrize("name", NAMES)
def test_the_oracle_of_these_tests_agrees_with_the_published_cache(name):
    run = recorded(name)
    assert oracle_mask(run.key, run.value, Rule(**run.params))[0].equal(run.visible)


@pytest.mark.parametrize("name", NAMES)
def test_pairs_and_stored_tokens_are_those_of_the_recorded_run(name):
    run = recorded(name)
    config, length = Rule(**run.params), run.key.shape[2]
    seen = run.visible.sum(dim=-1)
    for head in seen.tolist():
        assert [stored_size(t + 1, config) for t in range(length)] == head
        assert attended_pairs(length, config) == sum(head)


def _compresses_at_the_end(name: str) -> bool:
    """Whether the rule compresses as many partitions by the last query as the published cache does after it."""
    run = recorded(name)
    published = (run.key.shape[2] - run.params["sink_size"]) // run.params["lag_size"] - 1
    return partitions_compressed(run.key.shape[2] - 1, Rule(**run.params)) == published


@pytest.mark.parametrize("name", [name for name in NAMES if _compresses_at_the_end(name)])
def test_the_kept_positions_are_those_left_in_the_published_cache(name):
    run = recorded(name)
    config, length = Rule(**run.params), run.key.shape[2]
    indices = select(run.key, run.value, config).indices[0]
    raw_from = config.sink_size + compressed_at(length - 1, config) * config.lag_size
    for head, kept in enumerate(run.kept.tolist()):
        ours = [*range(config.sink_size), *indices[head].flatten().tolist(), *range(raw_from, length)]
        assert ours == kept


def test_most_recordings_take_part_in_the_comparison_of_kept_positions():
    assert [name for name in NAMES if not _compresses_at_the_end(name)] == ["visibility_5"]
