from dataclasses import replace

import pytest
from helpers import refused
from hypothesis import given
from hypothesis import strategies as st

from lrsa_lit.data.messages import Rendered
from lrsa_lit.data.prompts import (
    INSTRUCTION,
    Prompt,
    TooLong,
    _context_length,
    encode,
    find_answers,
    render_passage,
    render_prompt,
    token_span,
)
from lrsa_lit.data.tokenization import Tokens
from lrsa_lit.models.tiny import tiny_tokenizer


def test_the_context_comes_first_and_the_question_last(record, tokenizer):
    prompt, *_ = render_prompt(record, tokenizer)
    assert prompt == (
        "<|im_start|>user\n"
        "Isk\nThe Isk is 212 kilometres long.\n\n"
        "Café Grün\nLe café naît à Tesmar: TESMAR, not Tesmarville.\n\n"
        "Nobody lives in Tesmar.\n\n"
        f"{INSTRUCTION}\n\n"
        "Question: Where is the café?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_prompt_may_be_put_otherwise(record, tokenizer):
    prompt = Prompt("Read:\n{context}\nNow: {input}", answer="It is:", heading="Document {number}:")
    text, *_ = render_prompt(record, tokenizer, prompt)
    assert text == (
        "<|im_start|>user\nRead:\n"
        "Document 1:\nThe Isk is 212 kilometres long.\n\n"
        "Document 2:\nLe café naît à Tesmar: TESMAR, not Tesmarville.\n\n"
        "Document 3:\nNobody lives in Tesmar.\n"
        "Now: Where is the café?<|im_end|>\n"
        "<|im_start|>assistant\nIt is:"
    )
    example = encode(record, tokenizer, 1024, prompt)
    (gold,) = [tokenizer.decode(example["input_ids"][start:end]) for start, end in example["gold_spans"]]
    assert gold == "Document 2:\nLe café naît à Tesmar: TESMAR, not Tesmarville."
    assert tokenizer.decode(example["input_ids"][example["prompt_length"] :]) == " Tesmar<|im_end|>"


@pytest.mark.parametrize(
    "message",
    ["{context}{input}", "Read:\n{context}\nNow: {input}", "To {input}:\n\n{context}", "{input} {context} {input}"],
)
def test_the_context_ends_with_the_last_passage_wherever_the_question_stands(record, tokenizer, message):
    for question in ("Where?", "Nobody lives in Tesmar. Where is it?"):
        example = encode(replace(record, question=question), tokenizer, 1024, Prompt(message))
        text = tokenizer.decode(example["input_ids"][: example["context_length"]])
        before, _ = Prompt(message).around(question)
        assert text.removeprefix(f"<|im_start|>user\n{before}").startswith("Isk\n")
        assert text.endswith("kilometres long.\n\nCafé Grün\nLe café naît à Tesmar: TESMAR, not Tesmarville.\n\n"
                             "Nobody lives in Tesmar.")  # fmt: skip
        start, end = example["context_span"]
        assert end == example["context_length"]
        assert tokenizer.decode(example["input_ids"][start:end]) == text.removeprefix(f"<|im_start|>user\n{before}")
        assert example["first_turn"] == example["prompt_length"]


def test_a_token_that_reaches_beyond_the_context_is_of_it():
    tokens = Tokens([7, 8, 8, 9], [(0, 3), (3, 6), (3, 6), (6, 9)])
    for end, expected in ((3, 1), (4, 3), (5, 3), (6, 3), (7, 4)):
        assert _context_length(tokens, Rendered("", [], [(0, 2), (2, end)])) == expected


def test_without_passages_all_of_the_prompt_is_context(record, tokenizer):
    example = encode(replace(record, passages=(), supporting_titles=()), tokenizer, 1024)
    assert example["context_length"] == example["prompt_length"]
    start, end = example["context_span"]
    assert tokenizer.decode(example["input_ids"][:start]) == "<|im_start|>user\n"
    assert start == end


@pytest.mark.parametrize("question", ["{context}", "{input}"])
def test_a_question_may_hold_what_stands_for_others(record, tokenizer, question):
    text, *_ = render_prompt(replace(record, question=question), tokenizer)
    assert text.count("The Isk is") == 1
    assert f"Question: {question}<|im_end|>" in text


def test_training_sees_the_prompt_that_generation_starts_from(record, tokenizer):
    example = encode(record, tokenizer, 1024)
    prompt, *_ = render_prompt(record, tokenizer)
    ids, length = example["input_ids"], example["prompt_length"]
    assert ids[:length] == tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids[length:]) == "Tesmar<|im_end|>"
    assert ids[length:].count(tokenizer.eos_token_id) == 1


def test_spans_decode_to_the_evidence(record, tokenizer):
    example = encode(record, tokenizer, 1024)
    gold = [tokenizer.decode(example["input_ids"][start:end]) for start, end in example["gold_spans"]]
    answers = [tokenizer.decode(example["input_ids"][start:end]) for start, end in example["answer_spans"]]
    assert gold == [render_passage(record.passages[1])]
    assert answers == ["Tesmar", "TESMAR"]  # neither Tesmarville nor the town of a passage that is not gold


def test_all_answers_are_the_target_when_all_are_required(record, tokenizer):
    example = encode(replace(record, match="all"), tokenizer, 1024)
    assert tokenizer.decode(example["input_ids"][example["prompt_length"] :]) == "Tesmar, in Tesmar<|im_end|>"
    assert (example["answers"], example["match"]) == (["Tesmar", "in Tesmar"], "all")


def test_the_budget_is_exact(record, tokenizer):
    length = len(encode(record, tokenizer, 1024)["input_ids"])
    assert len(encode(record, tokenizer, length)["input_ids"]) == length
    assert encode(record, tokenizer, length - 1) == TooLong(length)


def test_a_question_that_fits_no_budget_says_what_it_needs(record, tokenizer):
    bare = len(encode(replace(record, passages=(), supporting_titles=()), tokenizer, 1024)["input_ids"])
    assert isinstance(encode(record, tokenizer, bare), TooLong)
    with refused("max_tokens", bare - 1, f"{bare} or more"):
        encode(record, tokenizer, bare - 1)


def test_a_chat_template_that_alters_text_is_refused(record):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] | upper }}"
    with refused("tokenizer", reason="changes the text"):
        encode(record, tokenizer, 1024)


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        ("Paris, paris; Parisian", ["Paris"], ["Paris", "paris"]),
        ("New York City", ["York", "New York"], ["New York"]),
        ("C++ or C", ["C++"], ["C++"]),
        ("no one said yes", ["yes"], []),
        ("no one said yes", ["No "], []),
    ],
)
def test_answers_are_whole_words(text, answers, expected):
    assert [text[start:end] for start, end in find_answers(text, answers, (0, len(text)))] == expected


def test_answers_do_not_reach_over_the_edges():
    assert list(find_answers("Paris Paris", ["Paris"], (1, 8))) == []
    assert list(find_answers("XParis Y", ["Paris"], (1, 6))) == []


@given(st.text(min_size=1, max_size=40), st.data())
def test_token_spans_cover_exactly_the_characters(text, data):
    tokenizer = tiny_tokenizer()
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    first, last = token_span(encoding["offset_mapping"], (start, end))
    assert bytes(tokenizer.decode(encoding["input_ids"][first:last]), "utf-8") == text[start:end].encode("utf-8")


def test_a_token_across_the_edge_belongs_to_the_span():
    offsets = [(0, 4), (4, 8), (8, 9), (9, 12)]
    assert token_span(offsets, (5, 9)) == (1, 3)
    assert token_span(offsets, (4, 10)) == (1, 4)
