"""Keys and values through factors of low rank: the factors, their ranks, and models that have them."""

import dataclasses
import itertools
import json
import math

import pytest
import torch
from helpers import VECTORS, refused
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lrsa_lit.attention.low_rank_linear import LowRankLinear
from lrsa_lit.models import Backbone, LoRA, LowRank, whitening
from lrsa_lit.models.adapters import check_holdable
from lrsa_lit.models.checkpoint import Trained
from lrsa_lit.models.factors import PROJECTIONS, factor, factors_in, install, projections, whole
from lrsa_lit.models.folder import difference, save_folder
from lrsa_lit.models.tiny import tiny_config, tiny_model, tiny_tokenizer
from lrsa_lit.models.truncation import factors_of, log_condition, progressive, progressive_ranks, rounded

pytestmark = pytest.mark.whole

IDS = torch.randint(3, 259, (2, 50), generator=torch.Generator().manual_seed(0))
WIDTH = 32


@pytest.fixture(scope="module")
def vectors():
    return json.loads((VECTORS / "systems/lorc.json").read_text())


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def layer(weight, rank, blocks=1, moments=None, bias=None):
    return LowRankLinear.of([factors_of(part, rank, moments) for part in weight.chunk(blocks, dim=1)], bias)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS.to(model.device)).logits


@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.parametrize("name", ["k", "v"])
def test_factors_are_the_recorded_ones(vectors, rank, name):
    expected, weight = vectors[f"joint_rank_{rank}"], tensor(vectors[f"W_{name}"])
    made = layer(weight, rank)
    assert torch.allclose(made.product().T, tensor(expected[f"W_{name}_approx"]), atol=1e-6)
    assert (made.product().T - weight).norm().item() == pytest.approx(expected[f"fro_error_{name}"], abs=1e-6)
    kept = {"k": "keys_before_rope", "v": "values"}[name]
    assert torch.allclose(made(tensor(vectors["X"])), tensor(expected[kept]).flatten(1), atol=1e-6)


@pytest.mark.parametrize("name", ["k", "v"])
def test_factors_of_each_head_are_the_recorded_ones(vectors, name):
    made = layer(tensor(vectors[f"W_{name}"]), rank=1, blocks=2)
    assert torch.allclose(made.product().T, tensor(vectors["per_head_rank_1"][f"W_{name}_approx"]), atol=1e-6)


def test_whitened_factors_are_the_recorded_ones(vectors):
    x, weight, expected = tensor(vectors["X"]), tensor(vectors["W_k"]), vectors["whitened_rank_2"]
    made = layer(weight, rank=2, moments=x.T @ x)
    assert torch.allclose(made.product().T, tensor(expected["W_k_approx"]), atol=1e-6)
    assert (made(x) - x @ weight).norm().item() == pytest.approx(expected["output_fro_error"], abs=1e-6)
    plain = layer(weight, rank=2)
    assert (plain(x) - x @ weight).norm().item() == pytest.approx(expected["plain_output_fro_error"], abs=1e-6)


def test_attention_over_factors_is_the_recorded_one(vectors):
    """With RoPE; values folded into the output projection give the same as values that are read."""
    x, heads, dim = tensor(vectors["X"]), vectors["query_heads"], vectors["head_dim"]
    groups = heads // vectors["kv_heads"]
    angles = torch.arange(len(x), dtype=torch.float64)[:, None] * vectors["rope_theta"] ** -(
        torch.arange(0, dim, 2, dtype=torch.float64) / dim
    )
    cos, sin = (part.repeat(1, 2)[:, None] for part in (angles.cos(), angles.sin()))

    def rotated(states):
        first, second = states.chunk(2, dim=-1)
        return states * cos + torch.cat([-second, first], dim=-1) * sin

    queries = rotated((x @ tensor(vectors["W_q"])).unflatten(1, (heads, dim)))
    out = tensor(vectors["W_o"]).unflatten(0, (heads, dim))
    for rank in (2, 3, 4):
        keys, values = (layer(tensor(vectors[f"W_{name}"]), rank) for name in "kv")
        read = rotated(keys(x).unflatten(1, (-1, dim))).repeat_interleave(groups, dim=1)
        scores = torch.einsum("qhd,khd->hqk", queries, read) / math.sqrt(dim)
        scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -math.inf).softmax(dim=-1)
        read = values(x).unflatten(1, (-1, dim)).repeat_interleave(groups, dim=1)
        unfolded = torch.einsum("hqk,khd,hdo->qo", scores, read, out)
        right = values.up[0].weight.T.unflatten(1, (-1, dim)).repeat_interleave(groups, dim=1)
        folded = torch.einsum("hqk,kr,hro->qo", scores, values.down(x), torch.einsum("rhd,hdo->hro", right, out))
        expected = tensor(vectors[f"joint_rank_{rank}"]["attention_output_after_W_o"])
        assert torch.allclose(unfolded, expected, atol=1e-6)
        assert torch.allclose(folded, expected, atol=1e-6)


def test_progressive_ranks_are_the_recorded_ones(vectors):
    expected = vectors["progressive"]
    logs = [math.log(k) + math.log(v) for k, v in zip(expected["kappa_k"], expected["kappa_v"], strict=True)]
    real = progressive(logs, expected["d_max"], expected["d_min"])
    assert real == pytest.approx(expected["ranks_real"], abs=1e-6)
    assert [rounded(each, 192) for each in real] == expected["ranks"]
    deep = progressive([2 * math.log(5000)] * 80, 1024, 256)
    assert [rounded(each, 1024) for each in deep[:3]] == vectors["progressive_80_layers_kappa_5000"]["first3"]
    assert [rounded(each, 1024) for each in deep[-3:]] == vectors["progressive_80_layers_kappa_5000"]["last3"]


def test_one_layer_has_the_largest_rank():
    assert progressive([3.0], 100, 50) == [100]


def test_a_condition_number_is_over_what_is_not_zero(vectors):
    expected = vectors["rank_deficient"]
    assert math.exp(log_condition(tensor(expected["W"]))) == pytest.approx(expected["kappa_over_nonzero_sigma"])


@given(
    logs=st.lists(st.floats(0, 20), min_size=1, max_size=40),
    width=st.integers(1, 300),
    share=st.floats(0.01, 1.0),
    mean=st.floats(0.0, 1.0),
)
def test_progressive_ranks_fall_and_sum_to_what_is_asked(logs, width, share, mean):
    total = max(len(logs), round(mean * width * len(logs)))
    ranks = progressive_ranks(logs, total, width, share)
    assert sum(ranks) == total
    assert all(1 <= rank <= width for rank in ranks)
    assert all(before >= after - 1 for before, after in itertools.pairwise(ranks))


@given(seed=st.integers(0, 100), rank=st.integers(1, 5))
def test_no_other_factors_of_a_rank_err_less_on_the_outputs(seed, rank):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 7, generator=generator, dtype=torch.float64) @ torch.diag(tensor([9, 5, 3, 1, 0.5, 0.1, 0.01]))
    weight = torch.randn(7, 6, generator=generator, dtype=torch.float64)
    left, right = factors_of(weight, rank, x.T @ x, ridge=1e-12)
    sizes = torch.linalg.svdvals(x @ weight)
    assert (x @ left @ right - x @ weight).norm().item() == pytest.approx(sizes[rank:].norm().item(), rel=1e-4)
    assert bool((left.gather(0, left.abs().argmax(dim=0, keepdim=True)) > 0).all())


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("bias", [None, torch.arange(6.0).double()])
def test_the_latent_and_its_reading_are_the_layer(blocks, bias):
    weight = torch.randn(5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    made, x = layer(weight, 2, blocks, bias=bias), torch.randn(2, 3, 5, dtype=torch.float64)
    assert made.down(x).shape == (2, 3, 2 * blocks)
    expected = nn.functional.linear(x, made.product(), bias)
    assert torch.allclose(made(x), expected)
    assert torch.allclose(made.read(made.down(x)), expected)
    assert (made.bias is None) == (bias is None)
    assert bias is None or torch.equal(made.bias, bias)


@pytest.mark.parametrize("grouping", ["joint", "head"])
def test_full_rank_is_the_dense_model_and_a_lower_one_is_not(grouping):
    dense = logits(Backbone("tiny").build())
    full = logits(Backbone("tiny", low_rank=LowRank(ratio=1.0, grouping=grouping)).build())
    assert torch.allclose(full, dense, atol=1e-4)
    lower = Backbone("tiny", low_rank=LowRank(ratio=0.5, grouping=grouping)).build()
    assert (logits(lower) - dense).abs().max() > 0.01
    ranks = {each.k_proj.ranks for each in projections(lower)} | {each.v_proj.ranks for each in projections(lower)}
    assert ranks == {(16,) if grouping == "joint" else (8, 8)}


def test_factors_compute_what_the_products_compute():
    model = Backbone("tiny", low_rank=LowRank(rank=10)).build()
    whole = Backbone("tiny").build()
    for narrow, wide in zip(projections(model), projections(whole), strict=True):
        for name in PROJECTIONS:
            getattr(wide, name).weight.data.copy_(getattr(narrow, name).product())
    assert torch.allclose(logits(model), logits(whole), atol=1e-4)


def test_progressive_layers_fall_and_dense_layers_stay():
    made = LowRank(ratio=0.5, schedule="progressive", min_share=0.25, dense_layers=(1,))
    torch.manual_seed(0)
    model = tiny_model(num_layers=4)
    factor(model, made)
    kinds = [type(each.k_proj) for each in projections(model)]
    assert kinds == [LowRankLinear, nn.Linear, LowRankLinear, LowRankLinear]
    ranks = [projections(model)[index].v_proj.ranks[0] for index in (0, 2, 3)]
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[0] > ranks[-1]
    assert sum(ranks) == 48


def test_factors_are_of_the_dtype_of_the_model():
    model = Backbone("tiny", dtype="bfloat16", low_rank=LowRank(ratio=0.5)).build()
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_the_same_factors_each_time():
    first, second = (Backbone("tiny", low_rank=LowRank(ratio=0.5)).build() for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.fixture
def moments(tmp_path):
    file = tmp_path / "moments.safetensors"
    whitening.write(file, whitening.measure(Backbone("tiny").build(), IDS.tolist()))
    return str(file)


def test_moments_are_those_of_the_inputs(moments):
    model, seen = Backbone("tiny").build(), []
    projections(model)[1].v_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1).double()))
    logits(model)
    expected = seen[0].T @ seen[0] / IDS.numel()
    found = whitening.read(moments)
    assert found.shape == (2, 64, 64)
    assert torch.allclose(found[1].double(), expected, rtol=1e-4, atol=1e-6)


def test_whitened_outputs_err_less(moments):
    """Of the first layer, whose inputs are those that were measured."""
    dense, errors = Backbone("tiny").build(), []
    for file in (None, moments):
        model = Backbone("tiny", low_rank=LowRank(rank=12, whitening=file)).build()
        seen = []
        dense.model.layers[0].self_attn.v_proj.register_forward_pre_hook(lambda _, args, to=seen: to.append(args[0]))
        logits(dense)
        wide, narrow = (projections(each)[0].v_proj for each in (dense, model))
        errors.append((narrow(seen[0]) - wide(seen[0])).norm().item())
    assert errors[1] < 0.98 * errors[0]


def test_adapters_train_on_the_factors():
    model = Backbone("tiny", low_rank=LowRank(ratio=0.5), lora=LoRA(rank=2)).build()
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert all("lora_" in name for name in trained)
    assert {"k_proj.down", "k_proj.up.0", "v_proj.down", "v_proj.up.0"} <= {
        name.split("self_attn.")[1].split(".lora")[0] for name in trained if "_proj.down.l" in name or ".up." in name
    }


def test_factors_are_found_and_put_in_place_again():
    model = Backbone("tiny", low_rank=LowRank(ratio=0.4, grouping="head"), lora=LoRA(rank=2)).build()
    found = factors_in(model.state_dict())
    assert len(found) == 2 * 2 * 3
    again = tiny_model(seed=0)
    install(again, found)
    assert torch.equal(logits(again), logits(Backbone("tiny", low_rank=LowRank(ratio=0.4, grouping="head")).build()))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({}, "ratio"),
        ({"ratio": 0.5, "rank": 3}, "ratio"),
        ({"ratio": 0.0}, "ratio"),
        ({"ratio": 1.01}, "ratio"),
        ({"rank": 0}, "rank"),
        ({"rank": 1, "min_share": 0.0}, "min_share"),
    ],
)
def test_settings_without_sense(change, field):
    with refused(field):
        LowRank(**change)


def other_config(**values):
    config = tiny_config()
    for name, value in values.items():
        setattr(config, name, value)
    return config


@pytest.mark.parametrize(
    ("low_rank", "config", "field", "reason"),
    [
        (LowRank(rank=33), {}, "low_rank.rank", "at most 32"),
        (LowRank(rank=17, grouping="head"), {}, "low_rank.rank", "at most 16"),
        (LowRank(rank=1, dense_layers=(2,)), {}, "low_rank.dense_layers", "0 to 1"),
        (LowRank(rank=1, dense_layers=(0, 1)), {}, "low_rank.dense_layers", "leave low_rank out"),
        (LowRank(rank=1), {"kv_lora_rank": 64}, "low_rank", "MLA.*leave low_rank out"),
        (LowRank(rank=1), {"num_kv_shared_layers": 1}, "low_rank", "shares.*leave low_rank out"),
        (LowRank(rank=1, whitening="nowhere"), {}, "low_rank.whitening", "lrsa input-moments"),
    ],
)
def test_models_that_do_not_suit(low_rank, config, field, reason):
    with pytest.raises(ValueError, match=reason) as error:
        low_rank.check(other_config(**config))
    assert str(error.value).startswith(field)


def test_moments_of_another_model(tmp_path, moments):
    file = tmp_path / "other"
    whitening.write(file, torch.eye(64).expand(3, 64, 64))
    with refused("low_rank.whitening", reason="3 layers"):
        Backbone("tiny", low_rank=LowRank(rank=1, whitening=str(file))).build()
    with refused("low_rank.sha256", "0", "that of the file"):
        Backbone("tiny", low_rank=LowRank(rank=1, whitening=moments, sha256="0")).build()
    file.write_bytes(b"no file of tensors")
    with refused("low_rank.whitening", reason="cannot be read"):
        Backbone("tiny", low_rank=LowRank(rank=1, whitening=str(file))).build()


def test_a_model_without_such_layers():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20))
    with refused("low_rank", "GPT2LMHeadModel", reason="k_proj and v_proj"):
        factor(model, LowRank(rank=1))


def test_factors_are_not_factored_again():
    with refused("low_rank", "LowRankLinear", reason="a layer that cannot be factored"):
        factor(Backbone("tiny", low_rank=LowRank(ratio=0.5)).build(), LowRank(rank=1))


def test_biases_are_added_behind_the_factors():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 300}
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(num_attention_heads=4, num_key_value_heads=2, **sizes)).eval()
    for each in projections(model):
        each.k_proj.bias.data.normal_()
        each.v_proj.bias.data.normal_()
    expected = logits(model)
    factor(model, LowRank(ratio=1.0, grouping="head"))
    assert torch.allclose(logits(model), expected, atol=1e-4)


def test_settings_are_what_a_checkpoint_says_again():
    from lrsa_lit.models.checkpoint import typed

    backbone = Backbone("tiny", low_rank=LowRank(ratio=0.5, dense_layers=(1,), whitening="gone"))
    assert typed(Backbone, dataclasses.asdict(backbone), "x").low_rank == backbone.low_rank


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plain_transformers_loads_the_products_and_a_backbone_the_factors(tmp_path, dtype):
    from transformers import AutoModelForCausalLM

    model = Backbone("tiny", dtype=dtype, low_rank=LowRank(ratio=0.5, grouping="head")).build()
    save_folder(model, tiny_tokenizer(), tmp_path / "narrow")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "narrow")
    assert all(isinstance(each.k_proj, nn.Linear) for each in projections(plain))
    expected = logits(model)
    assert difference(logits(plain), expected) < {"float32": 1e-5, "bfloat16": 0.05}[dtype]
    again = Backbone(str(tmp_path / "narrow"), dtype=dtype).build()
    assert {each.k_proj.ranks for each in projections(again)} == {(8, 8)}
    assert torch.equal(logits(again), expected)
    with refused("low_rank", reason="factors already"):
        Backbone(str(tmp_path / "narrow"), low_rank=LowRank(ratio=0.5)).check_low_rank()


def test_factors_beside_other_weights_are_refused(tmp_path):
    save_folder(Backbone("tiny", low_rank=LowRank(ratio=0.5)).build(), tiny_tokenizer(), tmp_path / "narrow")
    model = tiny_model()
    for each in projections(model):
        each.v_proj.weight.data *= 1.001
    model.save_pretrained(tmp_path / "narrow")
    with refused("source", reason="not the product"):
        Backbone(str(tmp_path / "narrow")).build()


def test_adapters_alone_are_not_written(tmp_path):
    with refused("low_rank", reason="export the merged model"):
        check_holdable(Backbone("tiny", lora=LoRA(), low_rank=LowRank(ratio=0.5)))
    save_folder(Backbone("tiny", low_rank=LowRank(ratio=0.5)).build(), tiny_tokenizer(), tmp_path / "narrow")
    with refused("low_rank", reason="export the merged model"):
        check_holdable(Backbone(str(tmp_path / "narrow"), lora=LoRA()))


def test_factors_above_a_base_of_four_bits_are_not_quantised(tmp_path):
    """They are made of the numbers that its weights stand for."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    save_folder(tiny_model(seed=3), tiny_tokenizer(), tmp_path / "whole")
    options = {"lora": LoRA(rank=2), "quantization": "nf4"}
    packed = Backbone(str(tmp_path / "whole"), **options).build().get_base_model()
    narrow = Backbone(str(tmp_path / "whole"), low_rank=LowRank(ratio=1.0), **options).build().get_base_model()
    weight = packed.model.layers[1].self_attn.k_proj.weight
    expected = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    factors = factors_in(narrow.state_dict())
    assert {weight.dtype for weight in factors.values()} == {torch.float32}
    found = whole(factors)["model.layers.1.self_attn.k_proj.weight"]
    assert torch.allclose(found, expected.cpu(), atol=1e-5)


def test_weights_that_were_trained_whole_are_factored():
    low_rank, trained = LowRank(ratio=0.5), tiny_model(seed=5)
    found = Trained(Backbone("tiny", low_rank=low_rank), None, trained.state_dict()).build()
    factor(trained, low_rank)
    assert torch.equal(logits(found.eval()), logits(trained.eval()))
