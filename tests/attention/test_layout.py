"""Padding and packing: every real token gets what its sequence gets alone, and pads get nothing."""

import math

import pytest
import torch
from helpers import refused

from lrsa_lit.attention import enable
from lrsa_lit.attention.layout import read_layout, restarting_positions

LENGTHS = [70, 5, 41, 1]
PADDED = 75
MODELS = {
    "Llama": ("Llama", ()),
    "GPTNeoX": ("GPTNeoX", ()),
    "SmolLM3": ("SmolLM3", ()),
    "one-dense": ("Llama", (1,)),
    "all-dense": ("Llama", (0, 1, 2)),
}


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS)
def model(request, tiny, rule):
    family, dense_layers = request.param
    return enable(tiny(family), rule.replace(dense_layers=dense_layers))


@pytest.fixture(scope="module")
def sequences(tokens):
    return [tokens(1, length, seed=length) for length in LENGTHS]


def alone(model, sequences):
    return [model(ids, use_cache=False).logits for ids in sequences]


def pad(sequences, side, columns=PADDED):
    """ids and mask (B, columns), padded on the left, the right, or both sides."""
    ids, mask = torch.zeros(len(sequences), columns, dtype=torch.long), torch.zeros(len(sequences), columns)
    starts = []
    for row, sequence in enumerate(sequences):
        length = sequence.shape[1]
        starts.append({"left": columns - length, "right": 0, "both": (columns - length) // 2}[side])
        ids[row, starts[-1] : starts[-1] + length] = sequence
        mask[row, starts[-1] : starts[-1] + length] = 1
    return ids, mask.long(), starts


def assert_rows(logits, starts, expected):
    for row, (start, one) in enumerate(zip(starts, expected, strict=True)):
        torch.testing.assert_close(logits[row, None, start : start + one.shape[1]], one, rtol=0, atol=1e-5)
    assert logits.isfinite().all()


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("use_cache", [False, True], ids=["no-cache", "dynamic-cache"])
@torch.no_grad()
def test_padded_rows_get_what_each_gets_alone_from_a_mask_only(model, sequences, side, use_cache):
    ids, mask, starts = pad(sequences, side)
    expected = alone(model, sequences)
    for pads in (0, 33):
        ids[mask == 0] = pads
        assert_rows(model(ids, attention_mask=mask, use_cache=use_cache).logits, starts, expected)


@torch.no_grad()
def test_embeddings_in_place_of_ids(model, sequences):
    ids, mask, starts = pad(sequences, "left")
    embedded = model.get_input_embeddings()(ids)
    logits = model(inputs_embeds=embedded, attention_mask=mask, use_cache=False).logits
    assert_rows(logits, starts, alone(model, sequences))


@torch.no_grad()
def test_arguments_by_place(model, sequences):
    ids, mask, starts = pad(sequences, "left")
    assert_rows(model(ids, mask).logits, starts, alone(model, sequences))
    decoder = model.base_model
    by_name = decoder(input_ids=ids, attention_mask=mask).last_hidden_state
    assert decoder(ids, mask).last_hidden_state.equal(by_name)


@torch.no_grad()
def test_a_row_of_pads_alone_is_finite_and_moves_no_other_row(model, sequences):
    ids, mask, starts = pad(sequences, "left")
    ids, mask = torch.cat([ids, ids[:1]]), torch.cat([mask, torch.zeros_like(mask[:1])])
    logits = model(ids, attention_mask=mask, use_cache=False).logits
    assert logits.isfinite().all()
    assert_rows(logits[:-1], starts, alone(model, sequences))
    assert model(ids[-1:], attention_mask=mask[-1:], use_cache=False).logits.isfinite().all()


def test_attention_outputs_at_pads_are_zero(model, sequences):
    ids, mask, _ = pad(sequences, "left")
    outputs = []
    layer = (model.model.layers if hasattr(model, "model") else model.gpt_neox.layers)[1]
    projection = layer.self_attn.o_proj if hasattr(layer, "self_attn") else layer.attention.dense
    handle = projection.register_forward_pre_hook(lambda _, args: outputs.append(args[0].detach()))
    model(ids, attention_mask=mask, use_cache=False)
    handle.remove()
    (attended,) = outputs
    assert attended[mask == 0].eq(0).all()
    assert attended[mask == 1].abs().amax(dim=-1).gt(0).all()


def pack(sequences):
    """ids and restarting positions (1, T), boundaries and starts."""
    positions = torch.cat([torch.arange(ids.shape[1]) for ids in sequences])[None]
    starts = [0]
    for ids in sequences:
        starts.append(starts[-1] + ids.shape[1])
    return torch.cat(sequences, dim=1), positions, torch.tensor(starts, dtype=torch.int32)


def assert_packed(logits, boundaries, expected):
    joined = torch.cat(expected, dim=1)
    assert boundaries[-1] == joined.shape[1]
    torch.testing.assert_close(logits, joined, rtol=0, atol=1e-5)


@pytest.mark.parametrize("use_cache", [False, True], ids=["no-cache", "dynamic-cache"])
@torch.no_grad()
def test_positions_that_restart_separate_packed_sequences(model, sequences, use_cache):
    ids, positions, boundaries = pack(sequences)
    logits = model(ids, position_ids=positions, use_cache=use_cache).logits
    assert_packed(logits, boundaries, alone(model, sequences))
    one = model(ids, use_cache=False).logits
    assert (logits - one)[:, LENGTHS[0] :].abs().max() > 0.1, "the row as one sequence is something else"


@pytest.mark.parametrize("positions", ["given", "not-given"])
@torch.no_grad()
def test_cu_seq_lens_separate_packed_sequences(model, sequences, positions):
    ids, restarting, boundaries = pack(sequences)
    given = {"position_ids": restarting} if positions == "given" else {}
    logits = model(ids, cu_seq_lens_q=boundaries, use_cache=False, **given).logits
    assert_packed(logits, boundaries, alone(model, sequences))


@torch.no_grad()
def test_packed_rows_of_a_padded_batch(model, sequences):
    rows = [sequences[:2], sequences[2:]]
    packed = [pack(row) for row in rows]
    ids, mask, starts = pad([ids for ids, _, _ in packed], "right", columns=80)
    positions = torch.zeros(2, 80, dtype=torch.long)
    for row, (_, restarting, _) in enumerate(packed):
        positions[row, : restarting.shape[1]] = restarting
    logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    assert_rows(logits, starts, [torch.cat(alone(model, row), dim=1) for row in rows])


def test_gradients_do_not_cross_packed_sequences(model, sequences):
    ids, positions, boundaries = pack(sequences)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, position_ids=positions, use_cache=False).logits
    start, stop = boundaries[2:4].tolist()
    logits[:, start:stop].square().sum().backward()
    assert embedded.grad[:, start:stop].abs().amax(dim=-1).gt(0).all()
    embedded.grad[:, start:stop] = 0
    assert embedded.grad.eq(0).all()


@torch.no_grad()
def test_positions_that_run_on_from_elsewhere_are_one_sequence(model, tokens):
    ids = tokens(1, 60)
    shifted = model(ids, position_ids=torch.arange(60)[None] + 9, use_cache=False).logits
    assert shifted.isfinite().all()
    plain = model(ids, position_ids=torch.arange(60)[None], use_cache=False).logits
    assert plain.equal(model(ids, use_cache=False).logits)


def test_positions_that_skip_start_a_sequence():
    layout = read_layout(None, torch.tensor([[0, 1, 2, 7, 8, 4]]), (1, 6), 0)
    assert layout.cu_seqlens.tolist() == [0, 3, 5, 6]


def mask_of(rows):
    return {"attention_mask": torch.tensor(rows)}


REFUSED = {
    "hole": (mask_of([[1] * 12, [1, 1, 0, 1] * 3]), None),
    "hole-between-pads": (mask_of([[0, 1, 0, 1] + [0] * 8, [1] * 12]), None),
    "4d-mask": ({"attention_mask": torch.zeros(2, 1, 12, 12)}, (2, 1, 12, 12)),
    "short-mask": (mask_of([[1] * 11] * 2), (2, 11)),
    "long-mask": (mask_of([[1] * 13] * 2), (2, 13)),
    "one-row-mask": (mask_of([[1] * 11 + [0]]), (1, 12)),
    "numbered-sequences": (mask_of([[1] * 5 + [2] * 7] * 2), 2),
    "numbered-and-padded": (mask_of([[0] * 5 + [1] * 3 + [2] * 4] * 2), 2),
    "negative": (mask_of([[1] * 11 + [-1]] * 2), -1),
    "additive": (mask_of([[0.0] * 11 + [-1e9]] * 2), -1000000000.0),
    "additive-that-hides-nothing": (mask_of([[0.0] * 12] * 2), 0.0),
    "half": (mask_of([[1.0] * 11 + [0.5]] * 2), 0.5),
    "not-a-number": (mask_of([[1.0] * 11 + [math.nan]] * 2), ...),
    "by-layer-type": ({"attention_mask": {"full_attention": None}}, "dict"),
    "not-causal": ({"is_causal": False}, ...),
    "flat-positions": ({"position_ids": torch.arange(12)}, (12,)),
    "short-positions": ({"position_ids": torch.arange(11)[None]}, (1, 11)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_laid_out_is_refused(case, tiny, tokens, rule):
    given, value = REFUSED[case]
    with refused(next(iter(given)), value):
        enable(tiny("Llama"), rule)(tokens(2, 12), **given)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.uint8, torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_zeros_and_ones_of_any_dtype_are_one_mask(dtype, tiny, tokens, rule):
    model, ids = enable(tiny("Llama"), rule), tokens(2, 40)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, :13] = 0
    expected = model(ids, attention_mask=mask).logits
    assert model(ids, attention_mask=mask.to(dtype)).logits.equal(expected)


BAD_BOUNDARIES = {
    "short": ([0, 5, 11], {}),
    "long": ([0, 13], {}),
    "late-start": ([3, 15], {}),
    "decreasing": ([0, 9, 4, 12], {}),
    "positions-run-on": ([0, 5, 12], {"position_ids": torch.arange(12)[None]}),
    "positions-restart-elsewhere": ([0, 5, 12], {"position_ids": torch.tensor([[*range(6), *range(6)]])}),
}


@pytest.mark.parametrize("case", BAD_BOUNDARIES)
def test_boundaries_that_do_not_fit_are_refused(case, tiny, tokens, rule):
    boundaries, given = BAD_BOUNDARIES[case]
    with refused("cu_seq_lens_q"):
        enable(tiny("Llama"), rule)(
            tokens(1, 12), cu_seq_lens_q=torch.tensor(boundaries, dtype=torch.int32), use_cache=False, **given
        )


@torch.no_grad()
def test_the_same_4d_mask_is_fine_without_the_rule(tiny, tokens):
    mask = torch.ones(2, 1, 12, 12, dtype=torch.bool).tril()
    assert tiny("Llama")(tokens(2, 12), attention_mask=mask).logits.isfinite().all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_default_device_moves_nothing(side, sequences):
    """As on a GPU machine whose user asks for a device for all that is made: the order of rows is of the host."""
    mask = pad(sequences, side)[1]
    shape = mask.shape[0], mask.shape[1]
    plain = read_layout(mask, None, shape, 0)
    with torch.device("meta"):
        found = read_layout(mask, None, shape, 0)
        restarting = restarting_positions(torch.tensor([0, 2, 5], device="cpu"), None, 5)
    torch.testing.assert_close(found.real, plain.real)
    torch.testing.assert_close(found.cu_seqlens, plain.cu_seqlens)
    assert restarting.tolist() == [[0, 1, 0, 1, 2]]
