"""CPC keeps the sentences nearest to the question; its encoder is that of a checkpoint, wherever it lies."""

import json
import shutil
from dataclasses import asdict

import pytest
import torch
from encoders import saved
from helpers import VECTORS
from torch.nn.functional import cosine_similarity

from lrsa_lit import UserError
from lrsa_lit.data import QAFiles
from lrsa_lit.data.filters import CPC
from lrsa_lit.data.filters.sentence_filter import ranked, selected
from lrsa_lit.data.filters.sentences import sentences_of
from lrsa_lit.data.records import Passage, QARecord
from lrsa_lit.models import Backbone, LoRA
from lrsa_lit.models.sentence_encoder import remove_causal_mask
from lrsa_lit.models.tiny import tiny_tokenizer

RECORDED = json.loads((VECTORS / "systems/cpc.json").read_text())
PASSAGES = (
    Passage("Isk", "The Isk is a river. It is 212 km long. Boats go there."),
    Passage("", "Nobody knows why.\nIt may be the rain."),
    Passage("Orda", "Orda is a town. It lies on the Isk."),
)
RECORD = QARecord("r", PASSAGES, "How long is the Isk?", ("212 km",), ("Isk",))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("encoder") / "encoder.ckpt")


def used(filter_):
    filter_.use(tiny_tokenizer())
    return filter_


def states_of(checkpoint, ids):
    backbone = Backbone("tiny", lora=LoRA(rank=2))
    model = backbone.build().eval()
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    model.load_state_dict({name.removeprefix("model."): weight for name, weight in weights.items()}, strict=False)
    remove_causal_mask(model)
    ids = torch.tensor([ids])
    with torch.no_grad():
        return model.base_model.model.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]


def test_scores_are_cosines_of_means_in_context(checkpoint):
    sentences = sentences_of(PASSAGES)
    tokenizer = tiny_tokenizer()
    texts = [
        "Isk The Isk is a river.", "It is 212 km long.", "Boats go there.", "Nobody knows why.", "It may be the rain.",
        "Orda Orda is a town.", "It lies on the Isk.",
    ]  # fmt: skip
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    # Of 100 tokens at most: two chunks, of which the longer one is as short as can be.
    halves = [range(4), range(4, 7)]
    question = states_of(checkpoint, tokenizer.encode(RECORD.question, add_special_tokens=False)).mean(dim=0)
    expected = []
    for half in halves:
        states = states_of(checkpoint, [token for number in half for token in ids[number]])
        for part in states.split([len(ids[number]) for number in half]):
            expected.append(float(cosine_similarity(part.mean(dim=0), question, dim=0)))
    found = CPC(checkpoint=checkpoint).scores(RECORD, sentences)
    assert found == pytest.approx(expected, abs=1e-5)
    assert found != pytest.approx(CPC(checkpoint=checkpoint, max_tokens=1000).scores(RECORD, sentences), abs=1e-3)


@pytest.mark.parametrize("rule", ["strict", "published"])
def test_recorded_selections(rule):
    order = ranked(RECORDED["similarity"], [False] * 5)
    assert order == RECORDED["order"]
    for budget, kept in RECORDED[f"{rule}_rule"].items():
        assert sorted(selected(order, RECORDED["sentence_tokens"], int(budget), rule)) == kept


def test_a_budget_is_kept(checkpoint):
    filter_ = used(CPC(kept=0.5, checkpoint=checkpoint))
    filtered = filter_.filtered(RECORD)
    assert 0 < filtered.tokens_left <= filtered.tokens // 2
    assert filtered.record.passages != PASSAGES
    assert filter_.filtered(RECORD).record == filtered.record


def test_what_is_kept_depends_on_the_question(checkpoint):
    filter_ = used(CPC(tokens=60, checkpoint=checkpoint))
    questions = ["How long is the Isk?", "Why?", "Where do boats go in the town of Orda?", "Rain or river, 1 2 3 4 5?"]
    left = {filter_.apply(QARecord("r", PASSAGES, question, ("x",))).passages for question in questions}
    assert len(left) > 1


def test_a_record_without_a_question_is_refused(checkpoint):
    with pytest.raises(UserError, match="ranks by the question"):
        used(CPC(checkpoint=checkpoint)).apply(QARecord("r", PASSAGES, " ", ("x",)))


def test_a_long_sentence_counts_by_its_nearest_piece(checkpoint):
    filter_ = CPC(checkpoint=checkpoint, max_tokens=8)
    (sentence,) = sentences_of([Passage("", "abcdefghijklmnop")])
    question = QARecord("r", (Passage("", "x"),), "ijklmnop", ("x",))
    assert filter_.scores(question, [sentence]) == pytest.approx([1.0], abs=1e-5)


def test_the_key_is_what_the_checkpoint_holds(checkpoint, tmp_path):
    elsewhere = shutil.copy(checkpoint, tmp_path / "other.ckpt")
    assert CPC(checkpoint=checkpoint).key == CPC(checkpoint=str(elsewhere), device="cpu").key
    assert CPC(checkpoint=checkpoint).key != CPC(checkpoint=saved(tmp_path / "more.ckpt", seed=1)).key
    assert CPC(checkpoint=checkpoint).key != CPC(checkpoint=checkpoint, max_tokens=50).key
    assert CPC(checkpoint=checkpoint).key != CPC(checkpoint=checkpoint, kept=0.5).key


def test_a_checkpoint_that_is_replaced_is_read_anew(tmp_path):
    filter_ = CPC(checkpoint=saved(tmp_path / "encoder.ckpt"))
    sentences = sentences_of(PASSAGES)
    before = filter_.key, filter_.scores(RECORD, sentences)
    saved(tmp_path / "encoder.ckpt", seed=1)
    assert filter_.key != before[0]
    assert filter_.scores(RECORD, sentences) != before[1]


def test_a_data_set_is_filtered_once(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("LRSA_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "test.jsonl").write_text(json.dumps(asdict(RECORD)) + "\n")

    def data():
        filter_ = CPC(kept=0.5, checkpoint=checkpoint)
        found = QAFiles(test=str(tmp_path / "test.jsonl"), tokenizer=tiny_tokenizer(), filter=filter_, max_tokens=900)
        found.prepare_data("test")
        return found.open_split("test")[0]["input_ids"]

    first = data()
    monkeypatch.setattr(CPC, "scores", None)
    assert data() == first


@pytest.mark.parametrize(
    ("content", "reason"),
    [(False, "is a model that answers"), (None, "does not exist"), ("text", "is not a checkpoint")],
)
def test_other_checkpoints(tmp_path, content, reason):
    path = tmp_path / "other.ckpt"
    if content is False:
        saved(path, encoder=False)
    elif content is not None:
        path.write_text(content)
    filter_ = used(CPC(checkpoint=str(path)))
    for ask in (lambda: filter_.key, lambda: filter_.apply(RECORD)):
        with pytest.raises(UserError, match=f"^checkpoint: .*{reason}"):
            ask()


def test_a_device_that_is_not_there(checkpoint):
    with pytest.raises(UserError, match=r"^device: 'nowhere' cannot be used"):
        used(CPC(checkpoint=checkpoint, device="nowhere")).apply(RECORD)


def test_random_numbers_are_left_alone(tmp_path):
    filter_ = CPC(checkpoint=saved(tmp_path / "encoder.ckpt", seed=5))
    state = torch.get_rng_state()
    filter_.scores(RECORD, sentences_of(PASSAGES))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("max_tokens", [0, 1.5, True])
def test_arguments_out_of_range(max_tokens):
    with pytest.raises(UserError, match="max_tokens"):
        CPC(checkpoint="x.ckpt", max_tokens=max_tokens)
