"""A cache in a file: it goes on as the saved one would have, or is refused in one line."""

import json

import pytest
import torch
from helpers import narrowed, refused
from safetensors.torch import load_file, save_file

from lrsa_lit.attention import LRSACache, LRSAConfig, enable, prefill
from lrsa_lit.attention.cache_file import FORMAT, read
from lrsa_lit.attention.weights_digest import weights_digest
from lrsa_lit.ops.sparse_attention import QueryAttention
from lrsa_lit.systems import KeyDiffBlocks

CHANGES = {
    "rule": {},
    "chunk": {"chunk_size": 5},
    "dense": {"dense_layers": (1,)},
    "queries": {"compressor": QueryAttention(window=3)},
    "heads": {"head_top_k": [[2, 5], 8, [0, 8]]},
}


def digest_again(path, **changes):
    """Write a file anew with other entries in its header."""
    saved = read(path)
    told = {"format": FORMAT} | saved.header | changes
    from lrsa_lit.attention.cache_file import _digest

    told = {name: json.dumps(value) for name, value in told.items()}
    save_file(saved.tensors, path, told | {"sha256": _digest(told, saved.tensors)})


@pytest.fixture
def saved(tiny, tokens, rule, tmp_path):
    """A model, a file of 50 tokens and these."""
    model, ids = enable(tiny("Llama"), rule), tokens(1, 50)
    cache = LRSACache.of(model)
    prefill(model, ids, cache)
    cache.save(tmp_path / "a.lrsa", model, ids.tolist())
    return model, tmp_path / "a.lrsa", ids


@torch.no_grad()
def test_a_cache_of_latents_goes_on_too(whole, tokens, rule, tmp_path):
    model, ids = enable(narrowed(whole("Llama"), "head"), rule.replace(latents=True)), tokens(1, 90)
    cache = LRSACache.of(model)
    prefill(model, ids[:, :70], cache)
    cache.save(tmp_path / "a.lrsa", model, ids[:, :70].tolist())
    loaded = LRSACache.load(tmp_path / "a.lrsa", model)
    assert loaded.nbytes == cache.nbytes
    assert prefill(model, ids[:, 70:], loaded).equal(prefill(model, ids[:, 70:], cache))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_loaded_cache_goes_on_as_the_saved_one(change, dtype, tiny, tokens, rule, tmp_path):
    model, ids = enable(tiny("Llama", dtype=dtype), rule.replace(**change)), tokens(2, 110)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    cache, rows = LRSACache.of(model), [ids[0, :70].tolist(), ids[1, 7:70].tolist()]
    prefill(model, ids[:, :70], cache, attention_mask=mask[:, :70])
    cache.save(tmp_path / "a.lrsa", model, rows, {"title": "Ω"})
    loaded = LRSACache.load(tmp_path / "a.lrsa", model)
    assert (loaded.nbytes, loaded.stored_tokens()) == (cache.nbytes, cache.stored_tokens())
    for at, stop in ((70, 71), (71, 109), (109, 110)):
        given = {"attention_mask": mask[:, :stop]}
        kept = model(ids[:, at:stop], past_key_values=cache, **given).logits
        assert model(ids[:, at:stop], past_key_values=loaded, **given).logits.equal(kept)
    saved = read(tmp_path / "a.lrsa")
    saved.check_tokens(rows)
    assert saved.header["notes"] == {"title": "Ω"}


def test_it_holds_what_the_rule_keeps(saved):
    model, path, _ = saved
    assert sum(tensor.nbytes for tensor in load_file(path).values()) == LRSACache.load(path, model).nbytes


def test_a_change_of_one_weight_is_another_model(saved):
    model, path, _ = saved
    before = weights_digest(model)
    assert weights_digest(model) == before
    with torch.no_grad():
        next(model.parameters())[5, 3] += 1e-9
    assert weights_digest(model) != before
    with refused("cache", str(path), reason="another model"):
        LRSACache.load(path, model)


def test_another_rule_is_named(saved, rule):
    model, path, _ = saved
    with refused("cache", str(path), reason="another rule: {'top_k': 3}"):
        LRSACache.load(path, enable(model, rule.replace(top_k=4)))


def test_other_tokens_are_refused(saved):
    with refused("cache", str(saved[1]), reason="another text"):
        read(saved[1]).check_tokens([saved[2][0, 1:].tolist()])


def test_another_version_is_refused(saved):
    digest_again(saved[1], format="lrsa-cache-9")
    with refused("cache", str(saved[1]), reason="'lrsa-cache-1' is allowed"):
        LRSACache.load(saved[1], saved[0])


def test_each_altered_or_missing_byte_is_noticed(saved):
    model, path, _ = saved
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    places = [0, 7, 8, 60, size // 2, size + 7, size + 8, (size + len(whole)) // 2, len(whole) - 1]
    for changed in [*(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :] for at in places),
                    *(whole[:at] for at in (0, 5, size, size + 8, len(whole) - 1)), whole + b"x"]:  # fmt: skip
        path.write_bytes(changed)
        with refused("cache", str(path)):
            LRSACache.load(path, model)


def test_other_files_are_refused(saved, tmp_path):
    model = saved[0]
    (tmp_path / "text.lrsa").write_text("no cache")
    save_file({"x": torch.zeros(2)}, tmp_path / "other.lrsa")
    for name in ("text.lrsa", "other.lrsa", "missing.lrsa", "."):
        with refused("cache", str(tmp_path / name)):
            LRSACache.load(tmp_path / name, model)


def test_tokens_must_be_those_that_were_taken_in(saved, tmp_path):
    model, path, ids = saved
    cache = LRSACache.load(path, model)
    with refused("tokens"):
        cache.save(tmp_path / "b.lrsa", model, [ids[0, :49].tolist()])
    with refused("tokens"):
        LRSACache.of(model).save(tmp_path / "b.lrsa", model, [[]])
    assert not (tmp_path / "b.lrsa").exists()


def test_systems_are_refused_by_name(tiny, tokens, tmp_path):
    model = enable(tiny("Llama"), LRSAConfig(system=KeyDiffBlocks(pairs=16)))
    cache = LRSACache.of(model)
    prefill(model, tokens(1, 30), cache)
    with refused("system", "KeyDiffBlocks"):
        cache.save(tmp_path / "a.lrsa", model, [list(range(30))])
