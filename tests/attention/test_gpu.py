"""The seam over the Triton kernels: ``make test-gpu``. The reference on the same device is what it is held to."""

import pytest
import torch

from lrsa_lit.attention import LRSACache, enable, using
from lrsa_lit.models.tiny import tiny_model
from lrsa_lit.ops.sparse_attention import LRSAConfig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

RULE = LRSAConfig(sink_size=4, lag_size=32, top_k=8)


@pytest.fixture
def model():
    return tiny_model(hidden_size=256).cuda().eval()


def tokens(*shape):
    return torch.randint(3, 259, shape, generator=torch.Generator().manual_seed(1)).cuda()


def logits(model, impl, **inputs):
    with torch.no_grad(), using(model, RULE, impl=impl):
        return model(**inputs).logits


def test_whole_rows(model):
    ids = tokens(2, 700)
    ours, theirs = (logits(model, impl, input_ids=ids) for impl in ("triton", "reference"))
    torch.testing.assert_close(ours, theirs, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows(model, side):
    ids, mask = tokens(3, 400), torch.zeros(3, 400, dtype=torch.long, device="cuda")
    for row, length in enumerate((400, 150, 1)):
        mask[row, slice(400 - length, None) if side == "left" else slice(length)] = 1
    ours, theirs = (logits(model, impl, input_ids=ids, attention_mask=mask) for impl in ("triton", "reference"))
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], atol=1e-2, rtol=1e-2)


def test_packed_rows_equal_their_sequences(model):
    ids = tokens(1, 500)
    positions = torch.cat([torch.arange(300), torch.arange(200)])[None].cuda()
    packed = logits(model, "triton", input_ids=ids, position_ids=positions, use_cache=False)
    alone = logits(model, "triton", input_ids=ids[:, 300:])
    torch.testing.assert_close(packed[:, 300:], alone, atol=1e-2, rtol=1e-2)


def test_gradients_with_and_without_checkpointing(model):
    ids, gradients = tokens(1, 500), []
    for impl, checkpointing in (("reference", False), ("triton", False), ("triton", True)):
        enable(model, RULE, impl=impl).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for reference, plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=0, atol=0)
        assert (plain - reference).norm() <= 2e-2 * reference.norm()


def test_cached_chunks_equal_the_parallel_pass(model):
    ids, cache, parts, seen = tokens(2, 300), LRSACache(RULE, model.config.num_hidden_layers), [], 0
    with torch.no_grad(), using(model, RULE):
        for count in (150, 1, 1, 40, 108):
            parts.append(model(ids[:, seen : seen + count], past_key_values=cache).logits)
            seen += count
        torch.testing.assert_close(torch.cat(parts, dim=1), model(ids).logits, atol=1e-2, rtol=1e-2)


def test_generation_of_unequal_rows(model):
    ids, mask = tokens(2, 200), torch.ones(2, 200, dtype=torch.long, device="cuda")
    mask[1, :90] = 0
    with using(model, RULE):
        settings = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False, "pad_token_id": 2}
        cache = LRSACache(RULE, model.config.num_hidden_layers)
        together = model.generate(ids, attention_mask=mask, past_key_values=cache, **settings)
        cache = LRSACache(RULE, model.config.num_hidden_layers)
        alone = model.generate(ids[1:, 90:], past_key_values=cache, **settings)
    assert (together[1:, 200:] == alone[:, 110:]).float().mean() > 0.9
