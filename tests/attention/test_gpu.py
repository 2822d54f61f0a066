"""The seam over the Triton kernels: ``make test-gpu``. Eager PyTorch on the same device is what it is held to."""

import contextlib

import pytest
import torch
from transformers import LlamaForCausalLM

from lrsa_lit.attention import Greedy, LRSACache, LRSAConfig, enable, graphed_decoding, prefill, using
from lrsa_lit.attention.decoding import Decoder
from lrsa_lit.models import Backbone
from lrsa_lit.models.tiny import tiny_config, tiny_model
from lrsa_lit.ops.sparse_attention import KeyValueStream, QueryAttention, RandomTokens, stored_size

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

RULE = LRSAConfig(sink_size=4, lag_size=32, top_k=8)


class Wide(Backbone):
    """Heads as wide as the kernels want them."""

    def _load(self):
        return tiny_model(hidden_size=256)


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
    ours, theirs = (logits(model, impl, input_ids=ids) for impl in ("triton", "eager"))
    torch.testing.assert_close(ours, theirs, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows(model, side):
    ids, mask = tokens(3, 400), torch.zeros(3, 400, dtype=torch.long, device="cuda")
    for row, length in enumerate((400, 150, 1)):
        mask[row, slice(400 - length, None) if side == "left" else slice(length)] = 1
    ours, theirs = (logits(model, impl, input_ids=ids, attention_mask=mask) for impl in ("triton", "eager"))
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], atol=1e-2, rtol=1e-2)


def test_packed_rows_equal_their_sequences(model):
    ids = tokens(1, 500)
    positions = torch.cat([torch.arange(300), torch.arange(200)])[None].cuda()
    packed = logits(model, "triton", input_ids=ids, position_ids=positions, use_cache=False)
    alone = logits(model, "triton", input_ids=ids[:, 300:])
    torch.testing.assert_close(packed[:, 300:], alone, atol=1e-2, rtol=1e-2)


def test_gradients_with_and_without_checkpointing(model):
    ids, gradients = tokens(1, 500), []
    for impl, checkpointing in (("eager", False), ("triton", False), ("triton", True)):
        enable(model, RULE, impl=impl).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for reference, plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=0, atol=0)
        assert (plain - reference).norm() <= 2e-2 * reference.norm()


@pytest.mark.parametrize(
    "change",
    [{}, {"dense_layers": (0,)}, {"dense_layers": (0, 1)}, {"head_top_k": [[0, 32], [8, 3]]}],
    ids=["sparse", "one dense", "dense", "heads"],
)
def test_compiled_layers_train_alike(change):
    """As exactly as launched ones: two bfloat16 passes of this model are far from each other, and from the truth."""
    ids, rule = tokens(2, 500), RULE.replace(**change)

    def trained(compiled, dtype):
        torch.manual_seed(0)
        model = enable(Wide("tiny", compile_layers=compiled).build().cuda(), rule)
        double = dtype == torch.float64
        with (
            torch.autocast("cuda", dtype=torch.bfloat16, enabled=not double),
            using(model.double() if double else model, rule, impl="eager" if double else "auto"),
        ):
            logits = model(ids, use_cache=False).logits
            logits.to(dtype).square().mean().backward()
        return [logits.detach().double(), *(parameter.grad.double() for parameter in model.parameters())]

    truth = trained(False, torch.float64)
    errors = [
        [(part - true).norm() / true.norm() for part, true in zip(trained(compiled, torch.float32), truth, strict=True)]
        for compiled in (False, True)
    ]
    for launched, fused in zip(*errors, strict=True):
        assert fused <= 1.25 * launched


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


@pytest.mark.parametrize("rows", [1, 3])
def test_a_graph_generates_what_launches_do(model, rows):
    # Past 200 tokens a partition is compressed every 32 tokens, and the buffers outgrow their room twice.
    ids, texts = tokens(rows, 200), []
    settings = {"max_new_tokens": 150, "min_new_tokens": 150, "do_sample": False, "pad_token_id": 2}
    enable(model, RULE)
    for served in (False, True):
        cache = LRSACache.of(model)
        with graphed_decoding(model, cache, room=40) if served else contextlib.nullcontext():
            texts.append(model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **settings))
        assert cache.stored_tokens()[0] == rows * stored_size(349, RULE.rule)
    assert (texts[0] == texts[1]).float().mean() > 0.9


CHANGES = {
    "rule": {},
    "queries": {"compressor": QueryAttention(window=8)},
    "heads": {"head_top_k": [[0, 32], [8, 3]]},
    "heads-queries": {"head_top_k": [[0, 8], 32], "compressor": QueryAttention(window=8)},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_steps_of_a_graph_give_the_parallel_pass(model, change):
    ids = tokens(2, 330)
    enable(model, RULE.replace(**change))
    cache = LRSACache.of(model)
    parts = [prefill(model, ids[:, :200], cache)]
    decoder = Decoder(model, cache, room=40)
    parts += [decoder.step(ids[:, at, None]).clone() for at in range(200, 330)]
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(parts, dim=1), model(ids).logits[:, 199:], atol=1e-2, rtol=1e-2)


def unequal(rows, columns, *lengths):
    """Rows padded on the left, and their mask."""
    ids, mask = tokens(rows, columns), torch.ones(rows, columns, dtype=torch.long, device="cuda")
    for row, length in enumerate(lengths):
        mask[row, : columns - length] = 0
    return ids, mask


@pytest.mark.parametrize("lengths", [(200, 90, 131), (200, 0, 1)], ids=["unequal", "pads-alone"])
@pytest.mark.parametrize("layers", [(), (1,)], ids=["sparse", "one dense"])
def test_a_graph_generates_unequal_rows_as_launches_do(model, layers, lengths):
    # Rows are compressed at different steps, and outgrow their memory.
    rule, (ids, mask), texts = RULE.replace(dense_layers=layers), unequal(3, 200, *lengths), []
    settings = {"max_new_tokens": 150, "min_new_tokens": 150, "do_sample": False, "pad_token_id": 2}
    enable(model, rule)
    for served in (False, True):
        cache = LRSACache.of(model)
        with graphed_decoding(model, cache, room=40) if served else contextlib.nullcontext():
            texts.append(model.generate(ids, attention_mask=mask, past_key_values=cache, **settings))
        assert cache.stored_tokens()[0] == sum(stored_size(length + 149, RULE.rule) for length in lengths)
    real = torch.tensor(lengths) > 0
    assert (texts[0] == texts[1])[real].float().mean() > 0.9


def test_frequencies_that_depend_on_the_length_are_served_without_a_graph():
    config = tiny_config(hidden_size=256)
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    config.max_position_embeddings = 250
    model = LlamaForCausalLM(config).cuda().eval()
    (ids, mask), texts = unequal(3, 200, 200, 90, 131), []
    settings = {"max_new_tokens": 100, "min_new_tokens": 100, "do_sample": False, "pad_token_id": 2}
    enable(model, RULE)
    for served in (False, True):
        cache = LRSACache.of(model)
        with graphed_decoding(model, cache) if served else contextlib.nullcontext():
            texts.append(model.generate(ids, attention_mask=mask, past_key_values=cache, **settings))
    assert (texts[0] == texts[1]).float().mean() > 0.9


@pytest.mark.parametrize("fuse", [False, True], ids=["launched", "fused"])
def test_steps_and_calls_of_unequal_rows_give_the_parallel_pass(model, fuse):
    ids, mask = unequal(3, 330, 330, 220, 170)
    enable(model, RULE)
    cache = LRSACache.of(model)
    parts = [prefill(model, ids[:, :200], cache, attention_mask=mask[:, :200])]
    decoder = Decoder(model, cache, room=200 if fuse else 20, fuse=fuse)
    parts += [decoder.step(ids[:, at, None]).clone() for at in range(200, 250)]
    with torch.no_grad():
        parts.append(model(ids[:, 250:290], attention_mask=mask[:, :290], past_key_values=cache).logits)
        parts += [decoder.step(ids[:, at, None]).clone() for at in range(290, 330)]
        whole = model(ids, attention_mask=mask).logits[:, 199:]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-2, rtol=1e-2)


def test_steps_of_unequal_rows_never_wait_for_the_device(model):
    ids, mask = unequal(3, 200, 200, 105, 135)
    enable(model, RULE)
    cache = LRSACache.of(model)
    prefill(model, ids, cache, attention_mask=mask)
    decoder = Decoder(model, cache)
    for at in range(5):
        decoder.step(ids[:, at, None])
    torch.cuda.set_sync_debug_mode("error")
    try:
        # In so few steps no row is compressed.
        for at in range(20):
            decoder.step(ids[:, at, None])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_stock_attention_sees_the_same_keys(model):
    ids = tokens(2, 300)
    stock = tiny_model(hidden_size=256).cuda().eval()
    cache = LRSACache.of(stock, RULE)
    ours = prefill(stock, ids, cache)
    with torch.no_grad(), using(model, RULE):
        torch.testing.assert_close(ours, model(ids).logits[:, -1:], atol=1e-2, rtol=1e-2)


def test_allocated_memory_is_what_the_rule_says():
    stream, per_token = KeyValueStream(RULE.rule), 2 * 2 * 2 * 64
    pairs = [torch.randn(1, 2, 60_000, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    query = torch.randn(1, 4, 60_000, 64, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        stream.attend(query[:, :, :1000], *(pair[:, :, :1000] for pair in pairs), 0.125)
        before, held = torch.cuda.memory_allocated(), stored_size(1000, RULE.rule)
        for start in range(1000, 60_000, 1000):
            part = slice(start, start + 1000)
            stream.attend(query[:, :, part], *(pair[:, :, part] for pair in pairs), 0.125)
    grown = torch.cuda.memory_allocated() - before
    assert grown <= (stored_size(60_000, RULE.rule) * 33 / 32 - held) * per_token + 2**20


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    "change",
    [{}, {"compressor": RandomTokens()}, {"compressor": QueryAttention(window=8)}, {"dense_layers": (0, 1)}],
    ids=str,
)
def test_one_graph_answers_all_prompts(change, rows, monkeypatch):
    model = tiny_model().eval().cuda()
    enable(model, LRSAConfig(sink_size=2, lag_size=16, top_k=4).replace(**change))
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(3, 259, (rows, length), generator=generator).cuda() for length in (90, 201, 60, 333)]
    captures, capture = [], torch.cuda.graph.__enter__
    monkeypatch.setattr(torch.cuda.graph, "__enter__", lambda graph: (captures.append(1), capture(graph))[1])
    greedy = Greedy(model, [2], max_new_tokens=24, longest_prompt=333)
    for batch in batches:
        for prompt, answer in zip(batch, greedy(batch), strict=True):
            options = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": 2, "pad_token_id": 2}
            options["past_key_values"] = LRSACache.of(model)
            whole = model.generate(prompt[None], attention_mask=torch.ones_like(prompt)[None], **options)
            alone = whole[0, len(prompt) :].tolist()
            assert answer == (alone[: alone.index(2)] if 2 in alone else alone)
    assert len(captures) == 1
