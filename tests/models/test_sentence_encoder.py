"""CPC's encoder: a causal language model that looks both ways, and the means of its states over sentences."""

import json

import pytest
import torch
from helpers import VECTORS
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from lrsa_lit import UserError
from lrsa_lit.models import Backbone, LoRA
from lrsa_lit.models.sentence_encoder import (
    NO_SEGMENT,
    balanced_chunks,
    embeddings,
    joined,
    remove_causal_mask,
    segment_means,
    states,
)
from lrsa_lit.models.tiny import tiny_model

RECORDED = json.loads((VECTORS / "systems/cpc.json").read_text())
TEXT = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14]]


@pytest.fixture
def model():
    found = tiny_model().double().eval()
    remove_causal_mask(found)
    return found


def test_recorded_embeddings_and_similarities():
    hidden, asked, expected, question, similarity = (
        torch.tensor(RECORDED[name], dtype=torch.float64)
        for name in ("token_states", "question_states", "sentence_embeddings", "question_embedding", "similarity")
    )
    means = segment_means(hidden[None], torch.tensor([RECORDED["segment_of_token"]]), 5)[0]
    torch.testing.assert_close(means, expected, atol=1e-9, rtol=0)
    found = segment_means(asked[None], torch.zeros(1, 4).long(), 1)[0, 0]
    torch.testing.assert_close(found, question, atol=1e-9, rtol=0)
    torch.testing.assert_close(means @ found, similarity, atol=1e-9, rtol=0)
    assert (means @ found).argsort(descending=True, stable=True).tolist() == RECORDED["order"]


def test_recorded_embeddings_in_float32():
    hidden = torch.tensor([RECORDED["token_states"]])
    means = segment_means(hidden, torch.tensor([RECORDED["segment_of_token"]]), 5)[0]
    torch.testing.assert_close(means, torch.tensor(RECORDED["sentence_embeddings"]), atol=1e-6, rtol=0)


def test_means_of_low_precision_are_float32_under_autocast_too():
    hidden = torch.randn(1, 6, 4, dtype=torch.bfloat16)
    segments = torch.tensor([[0, 0, 0, 1, 1, NO_SEGMENT]])
    with torch.autocast("cpu", torch.bfloat16):
        means = segment_means(hidden, segments, 2)
    expected = torch.nn.functional.normalize(hidden.double()[0, :3].mean(dim=0), dim=0)
    assert means.dtype == torch.float32
    torch.testing.assert_close(means[0, 0].double(), expected, atol=1e-6, rtol=0)


def test_gradient_of_means():
    hidden = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    segments = torch.tensor([[0, 0, 1, 1, 1], [1, 0, NO_SEGMENT, 0, NO_SEGMENT]])
    assert torch.autograd.gradcheck(lambda states: segment_means(states, segments, 2), hidden)


@pytest.mark.parametrize("place", range(4))
def test_a_later_token_changes_earlier_states(model, place):
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    changed = ids.clone()
    changed[0, 4] = 10
    before, after = (states(model, each, torch.ones_like(each)) for each in (ids, changed))
    assert (before - after)[0, place].abs().max() > 1e-6


def test_before_it_a_later_token_changes_nothing():
    model = tiny_model().double().eval()
    ids, changed = torch.tensor([[5, 6, 7]]), torch.tensor([[5, 6, 8]])
    before, after = (states(model, each, torch.ones_like(each)) for each in (ids, changed))
    torch.testing.assert_close(before[:, :2], after[:, :2], atol=0, rtol=0)


@pytest.mark.parametrize("pads", [1, 7])
@pytest.mark.parametrize("pad", [0, 200])
def test_padding_changes_nothing(model, pads, pad):
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    alone = states(model, ids, torch.ones_like(ids))
    padded = torch.nn.functional.pad(ids, (0, pads), value=pad)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, pads))
    torch.testing.assert_close(states(model, padded, mask)[:, :5], alone, atol=1e-12, rtol=0)


def test_gradients_reach_earlier_tokens_from_later_ones(model):
    ids = torch.tensor([[5, 6, 7, 8]])
    weights = model.get_input_embeddings().weight
    (gradient,) = torch.autograd.grad(states(model, ids, torch.ones_like(ids))[0, 0].sum(), weights)
    assert gradient[8].abs().max() > 0


FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "olmo2", "phi3", "smollm3", "granite", "gpt_neox"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_families(family, implementation):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(family, vocab_size=32, pad_token_id=0, **sizes)
    for name in ("num_key_value_heads", "head_dim"):
        if getattr(config, name, None) is not None:
            setattr(config, name, {"num_key_value_heads": 2, "head_dim": 8}[name])
    if getattr(config, "sliding_window", None) is not None:
        config.sliding_window = None
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).double().eval()
    remove_causal_mask(model)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    alone = states(model, ids, torch.ones_like(ids))
    with_pads = states(model, torch.tensor([[5, 6, 7, 8, 9, 3]]), torch.tensor([[1, 1, 1, 1, 1, 0]]))
    torch.testing.assert_close(with_pads[:, :5], alone, atol=1e-10, rtol=0)


def test_a_model_that_stays_causal_is_refused(monkeypatch):
    model = tiny_model()
    original = type(model.model).forward

    def causal(self, input_ids, attention_mask=None, **kwargs):
        causal_mask = torch.ones(len(input_ids), 1, *[input_ids.shape[1]] * 2, dtype=torch.bool).tril()
        return original(self, input_ids=input_ids, attention_mask=causal_mask, **kwargs)

    monkeypatch.setattr(type(model.model), "forward", causal)
    with pytest.raises(UserError, match="remains causal"):
        remove_causal_mask(model)


def test_adapters_are_looked_through():
    model = Backbone("tiny", lora=LoRA(rank=2)).build()
    remove_causal_mask(model)
    assert model.training
    found = embeddings(model.eval(), [TEXT])[0]
    assert found.shape == (4, 64)


@given(lengths=st.lists(st.integers(1, 9), max_size=14), most=st.integers(9, 30))
def test_chunks(lengths, most):
    chunks = balanced_chunks(lengths, most)
    assert [place for chunk in chunks for place in chunk] == list(range(len(lengths)))
    sums = [sum(lengths[place] for place in chunk) for chunk in chunks]
    assert all(0 < total <= most for total in sums)
    if lengths:
        cuts = _partitions(lengths, most)
        assert len(sums) == min(map(len, cuts))
        assert max(sums) == min(max(cut) for cut in cuts if len(cut) == len(sums))


def _partitions(lengths, most):
    """The sums of the runs of every way to cut that fits."""
    found = [[lengths[0]]]
    for length in lengths[1:]:
        found = [
            other for cut in found for other in ([*cut, length], [*cut[:-1], cut[-1] + length]) if other[-1] <= most
        ]
        # Of cuts with as many runs and the same end, the best one will do.
        best = {}
        for cut in found:
            key = len(cut), cut[-1]
            best[key] = min(best.get(key, cut), cut, key=max)
        found = list(best.values())
    return found


def test_a_sentence_that_fits_into_no_chunk_is_refused():
    with pytest.raises(UserError, match="must be at least 8"):
        balanced_chunks([3, 8, 2], 7)


@pytest.mark.parametrize("batch_tokens", [1, 12, 1000])
def test_embeddings_do_not_depend_on_the_batch(model, batch_tokens):
    contexts = [TEXT, [[20]], [], [[30, 31, 32], [33, 34, 35, 36, 37]]]
    together = embeddings(model, contexts, batch_tokens=batch_tokens)
    assert [len(each) for each in together] == [4, 1, 0, 2]
    for context, found in zip(contexts, together, strict=True):
        torch.testing.assert_close(found, embeddings(model, [context])[0], atol=1e-10, rtol=0)


def test_a_chunk_is_read_by_itself(model):
    whole = embeddings(model, [TEXT], max_tokens=10)[0]
    in_two = embeddings(model, [TEXT], max_tokens=5)[0]
    torch.testing.assert_close(in_two[:2], embeddings(model, [TEXT[:2]])[0], atol=1e-10, rtol=0)
    torch.testing.assert_close(in_two[2:], embeddings(model, [TEXT[2:]])[0], atol=1e-10, rtol=0)
    assert (whole - in_two).abs().max() > 1e-3


def test_a_sentence_depends_on_those_around_it(model):
    other = [*TEXT[:3], [15]]
    change = embeddings(model, [TEXT])[0][0] - embeddings(model, [other])[0][0]
    assert change.abs().max() > 1e-6


def test_joined_rows():
    ids, mask, segments = joined([[[5, 6], [7]], [[8]]])
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert segments.tolist() == [[0, 0, 1], [0, NO_SEGMENT, NO_SEGMENT]]
