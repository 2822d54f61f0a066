"""Rewritings, who writes and who judges them, on a tiny model and with parts that answer as they are told."""

import itertools
from dataclasses import replace

import pytest
import torch
from helpers import refused
from hypothesis import given
from hypothesis import strategies as st

from lrsa_lit.attention import LRSAConfig
from lrsa_lit.data.collate import collate
from lrsa_lit.data.extracts import extracts
from lrsa_lit.data.growing_file import growing_file
from lrsa_lit.data.prompts import PROMPT, encode
from lrsa_lit.data.records import Passage, QARecord
from lrsa_lit.evaluation.answer_scores import f1_score
from lrsa_lit.models import Backbone
from lrsa_lit.models.checkpoint import Trained
from lrsa_lit.tasks import LongContextQA
from lrsa_lit.tasks.preference_judge import PreferenceJudge, Verdict
from lrsa_lit.tasks.rewritings import SAMPLES, Rewritings, pair_of
from lrsa_lit.tasks.summariser import Summariser, digest_of_summaries

CPU, TINY = torch.device("cpu"), Trained(Backbone("tiny"), None, None)
TEXTS = ["The ferry leaves at noon.", "It rains. The ferry stays at home, and so does everybody else.", "Oslo."]
RECORD = QARecord(
    id="q",
    passages=(Passage("Ferry", TEXTS[1]), Passage("Noise", "Nothing."), Passage("Oslo", TEXTS[2])),
    question="Where is everybody?",
    answers=("at home",),
    supporting_titles=("Ferry", "Oslo"),
)


@pytest.fixture(scope="module")
def writer():
    return Summariser(TINY, CPU, 6)


def test_a_summary_is_the_same_alone_and_in_a_batch(writer):
    together = writer.summaries(TEXTS)
    assert together == [summary for text in TEXTS for summary in writer.summaries([text])]
    assert len(set(together)) == 3


def test_a_seed_draws_the_same_again_and_disturbs_nobody(writer):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = writer.drawn(TEXTS[0], 4, 0.7, seed="a")
    assert torch.equal(torch.get_rng_state(), before)
    assert first == writer.drawn(TEXTS[0], 4, 0.7, seed="a")
    assert first != writer.drawn(TEXTS[0], 4, 0.7, seed="b")
    assert len(set(first)) > 1


def test_next_to_no_temperature_draws_what_is_likeliest(writer):
    assert writer.drawn(TEXTS[0], 2, 1e-4, seed="a") == writer.summaries(TEXTS[:1]) * 2


def test_a_passage_beyond_the_models_positions_is_refused(writer):
    with refused("--max-new-tokens", 6, reason="positions for prompts"):
        writer.summaries(["x" * TINY.backbone.config.max_position_embeddings])


def test_who_wrote_a_summary_is_told_by_model_template_and_length():
    others = [("b", TINY, 6), ("a", TINY._replace(template_arguments={"x": 1}), 6), ("a", TINY, 7)]
    assert len({digest_of_summaries(*each) for each in [("a", TINY, 6), *others]}) == 4


@pytest.mark.parametrize("size", [1, 2])
def test_a_verdict_is_that_of_an_evaluation_with_dense_attention(size):
    found = PreferenceJudge(TINY, CPU, 4096, batch_size=size, max_new_tokens=5)
    records = [replace(RECORD, passages=RECORD.passages[:number]) for number in (3, 2, 1)]
    task = LongContextQA(Backbone("tiny"), LRSAConfig(lag_size=8, top_k=2), max_new_tokens=5)
    task.configure_model()
    for record, verdict in zip(records, found.verdicts(records, PROMPT), strict=True):
        batch = collate([encode(record, task.tokenizer, 4096)], 2)
        losses, tokens = task.losses(batch, None)
        ((answer,), _) = task.generate(batch, None)
        assert verdict.loss == pytest.approx(float(losses / tokens), rel=1e-5)
        assert verdict.f1 == f1_score(answer, record.answers)


@given(f1=st.floats(0, 1), whole=st.floats(0, 1), rise=st.floats(-1, 1))
def test_a_rewriting_succeeds_if_it_answers_or_harms_nothing_that_was_not_answered(f1, whole, rise):
    if abs(rise - 0.1) < 1e-9:
        return
    expected = f1 >= 0.5 or (whole < 0.5 and rise < 0.1)
    assert Verdict(f1, 2.0 + rise).succeeds(Verdict(whole, 2.0)) == expected


class Told:
    """Writes and judges as it is told, and counts how often."""

    def __init__(self, drawn, good=()):
        self.texts, self.good, self.asked = drawn, good, 0

    def drawn(self, passage, count, temperature, seed):
        assert (count, temperature) == (SAMPLES, 0.7)
        return self.texts

    def verdicts(self, records, prompt):
        self.asked += 1
        texts = [{passage.title: passage.text for passage in record.passages} for record in records]
        return [Verdict(float(any(each[title] in self.good for title in each)), 1.0 + len(each["Ferry"]))
                for each, title in zip(texts, itertools.cycle(["Ferry"]), strict=False)]  # fmt: skip

    judged = PreferenceJudge.judged


def lines(tmp_path, told, by="x", record=RECORD):
    with growing_file("--to", tmp_path / "candidates.jsonl") as file:
        found = Rewritings(told, told, by, file)
        return list(found.of([(record, PROMPT)])), found


def test_candidates_are_those_that_are_drawn_and_those_that_are_copied(tmp_path):
    told = Told(["Rain.", "", "Rain.", TEXTS[1]], good=["It rains.", TEXTS[1]])
    (ferry, oslo), _ = lines(tmp_path, told)
    made = {each["by"]: (each["text"], each["success"]) for each in ferry["candidates"]}
    # Empty ones are none, and equal ones are one: the first that made it.
    half = {"half": ("It rains ferry stays home so does everybody", False)}
    assert made == half | {"sample-1": ("Rain.", False), "sample-4": (TEXTS[1], True), "lead": ("It rains.", True)}
    assert (ferry["passage"], ferry["title"], ferry["question"]) == (TEXTS[1], "Ferry", "q")
    assert oslo["title"] == "Oslo"
    pair = pair_of(ferry, hard=True)
    assert (pair.passage, pair.chosen, pair.rejected) == (TEXTS[1], "It rains.", half["half"][0])
    assert (pair.title, pair.chosen_by, pair.rejected_by) == ("Ferry", "lead", "half")


def test_what_is_judged_is_not_judged_again(tmp_path):
    told = Told(["Rain."] * 4)
    first, _ = lines(tmp_path, told)
    assert told.asked == 2
    assert lines(tmp_path, told)[0] == first
    assert told.asked == 2
    lines(tmp_path, told, by="y")
    assert told.asked == 4
    assert lines(tmp_path, told, record=replace(RECORD, question="What leaves?"))[0] != first


def test_questions_that_cannot_be_judged_are_counted(tmp_path):
    told = Told(["Rain."] * 4)
    found, counts = lines(tmp_path, told, record=replace(RECORD, supporting_titles=()))
    assert (found, counts.without, counts.too_long) == ([], 1, 0)
    told.verdicts = lambda records, prompt: [None] * len(records)
    found, counts = lines(tmp_path, told)
    assert (found, counts.without, counts.too_long) == ([], 0, 2)


def test_what_a_question_is_too_long_with_is_no_candidate():
    judge = PreferenceJudge(TINY, CPU, 400, max_new_tokens=1)
    short = replace(RECORD, passages=RECORD.passages[:1], supporting_titles=("Ferry",))
    found = judge.judged(short, PROMPT, 0, {"long": "It rains." * 40, "lead": "It rains.", "whole": TEXTS[1]})
    assert [candidate.by for candidate, _ in found] == ["lead", "whole"]
    long = replace(short, passages=(Passage("Ferry", TEXTS[1] * 9),))
    assert judge.judged(long, PROMPT, 0, {"lead": "It rains."}) is None


def test_a_judge_keeps_to_its_positions():
    positions = TINY.backbone.config.max_position_embeddings
    judge = PreferenceJudge(TINY, CPU, 2 * positions, max_new_tokens=1)
    long = replace(RECORD, passages=(Passage("Ferry", "x" * positions),), supporting_titles=())
    assert judge.verdicts([long], PROMPT) == [None]


def test_a_line_of_another_form_is_refused(tmp_path):
    (tmp_path / "candidates.jsonl").write_text('{"key": "x"}\n')
    with refused(f"{tmp_path}/candidates.jsonl, line 1", reason="is missing"):
        lines(tmp_path, Told([]))


@pytest.mark.parametrize(
    ("text", "lead", "half"),
    [
        ("The ferry leaves at noon. It is red.", "The ferry leaves at noon.", "ferry leaves noon It red"),
        ("Oslo", "Oslo", "Oslo"),
        ("", "", ""),
    ],
)
def test_extracts(text, lead, half):
    assert extracts(text) == {"lead": lead, "half": half, "whole": text}
