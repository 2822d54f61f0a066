"""The other attentions that benchmarks measure attend to the pairs that they claim."""

import json

import attention_peers
import decoding
import pytest
import records
import torch
from attention_cells import Cell
from random_model import WORDS, random_model, word_tokenizer
from records import Record
from timing import inputs

from lrsa_lit.ops.sparse_attention import select, sparse_attention


@pytest.mark.parametrize(
    "cell", ["4/2/16:32/8:203", "3/1/24:16/4:111", "2/2/16:32/8:40", "4/1/16:16/0:130", "4/2/8:16/16:97"]
)
def test_flex_attention_over_the_compact_buffer_is_the_rule(cell):
    cell = Cell.of(cell)
    tensors = [part.double() for part in cell.inputs("cpu")]
    attend = attention_peers.flex(cell, tensors, compiled=False)
    query, key, value, _ = tensors
    truth = sparse_attention(query, key, value, cell.rule, selection=select(key, value, cell.rule), impl="eager")
    torch.testing.assert_close(attend(query, key, value), truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tokens", [1, 300, 1024, 1500])
def test_nsa_attends_to_as_many_pairs_as_the_rule_up_to_half_a_block(tokens):
    cell = Cell(32, 2, 128, 128, 32, tokens)
    blocks, counts = (part[0, :, 0] for part in attention_peers.nsa_blocks(cell, torch.device("cpu")))
    visible = attention_peers._nsa_visible(cell, torch.device("cpu"))
    for t in (0, tokens // 2, tokens - 1):
        listed = blocks[t, : counts[t]].tolist()
        assert len(set(listed)) == len(listed)
        assert t // 64 in listed
        assert max(listed) == t // 64
        assert min(listed) >= 0
        assert visible[t].nonzero()[:, 0].tolist() == [j for j in range(t + 1) if j // 64 in listed]
    pairs = visible.sum() / (tokens * (tokens + 1) // 2)
    assert attention_peers._nsa_share(cell) == pytest.approx(float(pairs))
    ours = cell.pair_share * (tokens + 1) / 2
    assert abs(float(visible.sum()) / tokens - ours) <= 32


def test_peers_that_are_missing_are_written_with_the_reason_and_those_asked_for_later_are_added(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(attention_peers, "gate", lambda _: True)
    monkeypatch.setattr(attention_peers, "lrsa", lambda *_: {"forward": 1.0, "both": 2.0})
    monkeypatch.setitem(attention_peers.PEERS, "flex", (lambda *_: torch.add, lambda _: 1.0))
    options = ["--device", "cpu", "--cells", "4/2/16:32/8:70", "--repeats", "1", "--out", str(tmp_path)]

    def rows(*more):
        assert attention_peers.main([*options, *more]) == 0
        return {row["who"]: row for row in json.loads((tmp_path / "attention_peers.json").read_text())["rows"]}

    assert attention_peers.main([*options, "--seconds", "-1"]) == 0
    assert capsys.readouterr().out.startswith("7 rows left for another run")
    first = rows("--peers", "flash", "fa4", "nsa")
    assert [name for name, row in first.items() if "skipped" in row] == ["flash", "fa4", "nsa"]
    again = rows("--peers", "flash", "flex")
    assert "TypeError" in again["flex"]["skipped"]
    assert {**again, "flex": None} == {**first, "flex": None}


def test_a_row_that_fails_is_written_and_does_not_end_the_others(tmp_path):
    about = {"device": "cpu", "commit": "abc", "torch": "1", "triton": None, "command": "first"}
    record = Record(tmp_path / "r.json", about, ("who",))
    measured = record.measure([({"who": "a"}, lambda: {"ms": 1 / 0}), ({"who": "b"}, lambda: {"ms": 1.0})])
    assert [*measured] == record.rows == json.loads((tmp_path / "r.json").read_text())["rows"]
    assert record.rows[0]["skipped"] == "ZeroDivisionError: division by zero"
    assert record.rows[1] == {"who": "b", "ms": 1.0}
    again = record.measure([({"who": "a"}, lambda: {"ms": 2.0}), ({"who": "b"}, lambda: {"ms": 2.0})])
    assert [*again] == [{"who": "a", "ms": 2.0}]
    assert not [*record.measure([({"who": "c"}, lambda: {"ms": 2.0})], until=float("-inf"))]


def test_inputs_are_views_as_a_model_passes_them():
    query, key, *_ = inputs(4, 2, 8, 5, device="cpu")
    assert query.shape == (1, 4, 5, 8)
    assert key.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("form", ["sdpa-flash-folded", "sdpa-cudnn", "decoder"])
def test_forms_of_decoding_give_exact_attention_and_the_logits_of_the_model(form):
    assert decoding.form_error(form, 3, "cpu", rows=83) < 1e-6
    model = random_model(2, "cpu")
    assert decoding.static_error(model, form, tokens=45) < 1e-5
    assert model.config._attn_implementation == "sdpa"


def test_rows_are_kept_for_the_same_code_and_what_was_skipped_is_tried_again(tmp_path):
    about = {"device": "cpu", "commit": "abc", "torch": "1", "triton": None, "command": "first"}
    record = Record(tmp_path / "r.json", about, ("who",))
    record.add({"who": "a", "ms": 1.0})
    record.add({"who": "b", "skipped": "absent"})
    record.add({"who": "a", "ms": 2.0})
    again = Record(tmp_path / "r.json", {**about, "command": "second"}, ("who",))
    assert again.rows == [{"who": "b", "skipped": "absent"}, {"who": "a", "ms": 2.0}]
    assert again.about["command"] == "first; second"
    assert again.has(who="a")
    assert not again.has(who="b")
    assert not Record(tmp_path / "r.json", {**about, "commit": "def"}, ("who",)).rows


def test_code_without_git_has_a_digest_so_that_its_rows_are_kept(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("COMMIT", raising=False)
    commit = records.about(device="cpu")["commit"]
    assert commit.startswith("sha256 ")
    assert commit == records.about(device="cpu")["commit"]
    monkeypatch.setenv("COMMIT", "abc")
    assert records.about(device="cpu")["commit"] == "abc"


def test_a_document_has_a_token_for_each_word_and_every_token_of_an_answer_is_text():
    tokenizer = word_tokenizer(60)
    assert len(tokenizer) == 60
    assert len(tokenizer(" ".join(WORDS))["input_ids"]) == len(WORDS)
    plain = [number for number in range(60) if number not in tokenizer.all_special_ids]
    assert len(tokenizer.decode(plain, skip_special_tokens=True).split()) == len(plain) == 57
