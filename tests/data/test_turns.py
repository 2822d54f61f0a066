"""Conversations about one context: earlier questions with their reference answers, then the one that is asked."""

import json
from collections import Counter, defaultdict
from dataclasses import asdict, replace
from itertools import pairwise

import data_files
import pytest
from chat_templates import QWEN3, TEMPLATES, with_template
from helpers import refused

from lrsa_lit.data import Articles, NeedlesInTurn, QAFiles, SquadArticles
from lrsa_lit.data.collate import collate
from lrsa_lit.data.module import SPLITS
from lrsa_lit.data.prompts import PROMPT, TooLong, encode
from lrsa_lit.data.records import QARecord, Turn, asked_in_turn, check_record
from lrsa_lit.data.split_facts import SplitFacts
from lrsa_lit.evaluation.answer_scores import normalize_answer


@pytest.fixture(scope="module")
def needles(tokenizer):
    return NeedlesInTurn(turns=3, tokenizer=tokenizer, max_tokens=2800, train=7, val=3, test=6)


@pytest.fixture
def conversation(record):
    asked = [
        replace(record, id="a", question=" Where is the café? "),
        replace(record, id="b", question="How long is the Isk?", answers=("212", "212 km")),
        replace(record, id="c", question="And who lives there?", answers=("Nobody", "yes"), match="all"),
    ]
    return asked_in_turn(asked)


def of(example, part):
    return example["input_ids"][part]


def test_each_turn_has_those_before_it(conversation):
    assert [turn.task for turn in conversation] == ["turn-1", "turn-2", "turn-3"]
    assert [turn.id for turn in conversation] == ["a", "b", "c"]
    assert conversation[0].turns == ()
    assert conversation[2].turns == (Turn(" Where is the café? ", "Tesmar"), Turn("How long is the Isk?", "212"))


def test_the_tokens_only_grow_from_turn_to_turn(conversation, tokenizer):
    examples = [encode(turn, tokenizer, 5000) for turn in conversation]
    assert len({example["first_turn"] for example in examples}) == 1
    assert examples[0]["first_turn"] == examples[0]["prompt_length"]
    for before, after in pairwise(examples):
        # Up to the answer's own tokens; the template writes what ends them.
        learnt = before["input_ids"][:-1]
        assert after["input_ids"][: len(learnt)] == learnt
        assert after["prompt_length"] > len(learnt)


def test_a_conversation_reads_as_the_chat_template_writes_it(conversation, tokenizer):
    example = encode(conversation[2], tokenizer, 5000)
    first = tokenizer.decode(of(encode(conversation[0], tokenizer, 5000), slice(None)))
    messages = [{"role": "user", "content": first.removeprefix("<|im_start|>user\n").partition("<|im_end|>")[0]}]
    for answer, question in (("Tesmar", "How long is the Isk?"), ("212", "And who lives there?")):
        asked = "".join(PROMPT.around(question)).strip()
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": asked}]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(of(example, slice(example["prompt_length"]))) == expected
    assert tokenizer.decode(of(example, slice(example["prompt_length"], None))) == "Nobody, yes<|im_end|>"


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_well_known_templates(template, conversation):
    tokenizer = with_template(template)
    example = encode(conversation[1], tokenizer, 5000)
    text = tokenizer.decode(of(example, slice(example["prompt_length"])))
    assert text.index("Where is the café?") < text.index("Tesmar", text.index("Where is the café?"))
    assert text.index("How long is the Isk?") > text.rindex("Tesmar")


def test_a_template_that_rewrites_earlier_turns_is_refused(conversation):
    tokenizer = with_template(QWEN3)
    thinking = replace(conversation[1], turns=(Turn("Why?", "<think>so</think>Oslo"),))
    with refused("tokenizer", reason="rewrites earlier turns"):
        encode(thinking, tokenizer, 5000)


def test_control_tokens_in_an_earlier_answer_are_text(conversation, tokenizer):
    plain = encode(conversation[1], tokenizer, 5000)
    special = encode(replace(conversation[1], turns=(Turn("Why?", "<|im_end|>"),)), tokenizer, 5000)
    ends = [Counter(of(each, slice(each["prompt_length"])))[tokenizer.eos_token_id] for each in (plain, special)]
    assert ends[0] == ends[1]


def test_what_does_not_fit_counts_the_earlier_turns(conversation, tokenizer):
    needed = len(encode(conversation[2], tokenizer, 5000)["input_ids"])
    assert encode(conversation[2], tokenizer, needed - 1) == TooLong(needed)
    with refused("max_tokens", 300, reason=""):
        encode(conversation[2], tokenizer, 300)


def test_a_record_with_turns_comes_back_from_json(conversation, tmp_path, tokenizer):
    for turn in conversation:
        check_record(turn)
        assert QARecord.from_dict(json.loads(json.dumps(asdict(turn)))) == turn
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps(asdict(turn)) for turn in conversation))
    files = QAFiles(test=str(tmp_path / "x.jsonl"), tokenizer=tokenizer)
    assert list(files.records("test")) == conversation
    for wrong, field in (({"turns": [{"question": "x"}]}, "turns[0].answer"), ({"turns": "x"}, "turns")):
        with refused(field):
            QARecord.from_dict(asdict(conversation[0]) | wrong)
    with refused("turns[0].answer", reason="is empty"):
        QARecord.from_dict(asdict(conversation[0]) | {"turns": [{"question": "x", "answer": " "}]})


def test_turns_of_one_context_are_known_to_share_it(needles):
    examples = [needles.to_example(record) for record in needles.records("test")]
    assert SplitFacts.of(examples).contexts == [0, 0, 0, 1, 1, 1]
    batch = collate(examples[:2], 0)
    assert batch["first_turn"][0] == batch["prompt_length"][0]
    assert batch["first_turn"][1] < batch["prompt_length"][1]
    assert batch["context_length"][0] == batch["context_length"][1] < batch["first_turn"][0]


def test_needles_are_asked_for_one_after_the_other(needles, tokenizer):
    records = needles.records("test")
    assert [record.id for record in records[2:4]] == ["test-0-turn-3", "test-1-turn-1"]
    assert len(needles.records("train")) == 7
    contexts = defaultdict(set)
    for record in records:
        example = needles.to_example(record)
        text = tokenizer.decode(of(example, slice(example["prompt_length"])))
        contexts[record.id.partition("-turn")[0]].add(text.partition("Answer the question")[0])
        (span,) = example["answer_spans"]
        assert tokenizer.decode(of(example, slice(*span))) == record.answers[0]
        for turn in record.turns:
            key, note = turn.question.split()[7], text.index(f" is: {turn.answer}.")
            assert text[:note].endswith(key)
            # In its note, in its turn and nowhere else.
            assert text.count(turn.answer) == 2
        if record.task == "turn-3":
            assert len({record.answers[0], *(turn.answer for turn in record.turns)}) == 3
            assert 2600 < len(example["input_ids"]) <= 2800
    assert [len(texts) for texts in contexts.values()] == [1, 1]


def test_questions_of_an_article_make_conversations(tmp_path, tokenizer):
    source = data_files.squad(tmp_path)
    single, data = (SquadArticles(**source, turns=turns, tokenizer=tokenizer, max_tokens=4096) for turns in (1, 3))
    for split in SPLITS:
        # Both questions of an article have the same answer, so no conversation has two.
        assert {record.task for record in data.records(split)} == {"turn-1"}
        assert Counter(r.id for r in data.records(split)) == Counter(r.id for r in single.records(split))


def test_conversations_about_the_real_articles(tokenizer):
    data = SquadArticles(tokenizer=tokenizer, max_tokens=100_000, turns=4)
    records = data.records("test")
    questions = [record.id for article in data.articles("test") for record in article]
    assert sorted(record.id for record in records) == sorted(questions)
    for before, record in zip([None, *records], records, strict=False):
        assert record.task == f"turn-{len(record.turns) + 1}"
        if record.turns:
            assert record.turns == (*before.turns, Turn(before.question, before.target))
            assert record.passages == before.passages
            assert normalize_answer(record.target) not in {normalize_answer(turn.answer) for turn in record.turns}
    tasks = Counter(record.task for record in records)
    assert len(tasks) == 4
    assert tasks["turn-4"] > 0.9 * tasks["turn-1"]


def test_texts_have_no_turns():
    with refused("turns", 2):
        Articles(max_tokens=4096, turns=2)


@pytest.mark.parametrize(("cls", "turns"), [(SquadArticles, 0), (NeedlesInTurn, 1)])
def test_a_bad_number_of_turns_is_refused(cls, turns):
    with refused("turns", turns):
        cls(turns=turns)
