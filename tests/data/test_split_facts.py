"""The digest and the contexts of a split's questions."""

import numpy as np

from lrsa_lit.data.split_facts import SplitFacts


def example(number, tokens, *, prompt=None, **more):
    return {
        "id": f"q{number}",
        "input_ids": tokens,
        "prompt_length": len(tokens) - 2 if prompt is None else prompt,
        "gold_spans": [(3, 9)],
        "answer_spans": [],
        "answers": ("a",),
        "match": "any",
        **more,
    }


def test_a_digest_is_of_tokens_spans_and_answers_in_their_order():
    examples = [example(0, list(range(40))), example(1, list(range(30, 90)), subject="x")]
    # As in results that were written with 16-bit tokens.
    assert SplitFacts.of(examples).digest == "4853a986ae8e"
    # Where contexts end changes no question.
    assert SplitFacts.of([{**each, "context_length": 4} for each in examples]) == SplitFacts.of(examples)
    found = {SplitFacts.of(examples).digest}
    for changed in (
        examples[::-1],
        [examples[0] | {"input_ids": [7, *range(1, 40)]}, examples[1]],
        [examples[0] | {"gold_spans": [(3, 8)]}, examples[1]],
        [examples[0] | {"answers": ("b",)}, examples[1]],
        [examples[0], examples[1] | {"subject": "y"}],
        [examples[0] | {"input_ids": [1 << 16, *range(1, 40)]}, examples[1]],
        [examples[0] | {"input_ids": [1 << 17, *range(1, 40)]}, examples[1]],
    ):
        found.add(SplitFacts.of(changed).digest)
    assert len(found) == 8
    same = [{**each, "input_ids": np.asarray(each["input_ids"], dtype=np.int32), "answers": list(each["answers"]),
             "gold_spans": [list(span) for span in each["gold_spans"]]} for each in examples]  # fmt: skip
    assert SplitFacts.of(same) == SplitFacts.of(examples)


def test_questions_on_one_context_have_its_number():
    text, other = list(range(1000)), [*range(500), *range(600, 1100)]
    long = [[*text, 5, 6, 7], [*other, 5, 6, 7], [*text, 8], [*other, 1, 2, 3, 4]]
    short = [text[:300], text[:300]]
    facts = SplitFacts.of([example(number, tokens) for number, tokens in enumerate([*long, *short])])
    assert facts.contexts == [0, 1, 0, 1, 2, 3]
    assert facts.questions == 6
    assert facts.length == (1003 + 1003 + 1001 + 1004 + 600) // 6


def test_subjects_decide_where_there_are_any():
    text = list(range(1000))
    examples = [example(0, text, subject="a"), example(1, text, subject="b"), example(2, text[::-1], subject="a"),
                example(3, text)]  # fmt: skip
    assert SplitFacts.of(examples).contexts == [0, 1, 0, 2]
