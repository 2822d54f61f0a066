"""RULER's thirteen tasks as it has them; tests/data/test_ruler.py has what they share with the older ones."""

import random
import re
from collections import Counter

import pytest
from helpers import refused

from lrsa_lit.data.prompts import TooLong
from lrsa_lit.data.qa_tasks import QA_TASKS
from lrsa_lit.data.ruler13 import RULER13, Ruler13
from lrsa_lit.data.ruler_tasks import NIAH, NOISE, SIZED_NAMES, essay, in_pieces, variable_tracking
from lrsa_lit.data.split_facts import SplitFacts
from lrsa_lit.data.squad import SquadArticles, article_of
from lrsa_lit.data.word_tasks import WORD_TASKS
from lrsa_lit.evaluation.answer_scores import recall

BUDGET = 4000
BEGIN, TURN = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
WORD, NUMBER = r"[a-z]+-[a-z]+", r"[1-9]\d{6}"
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"

OF_RULER = {"values": "numbers", "keys": WORD, "value": NUMBER, "needles": 1, "asked": 1, "answers": 1}
TABLE = {
    "niah_single_1": OF_RULER,
    "niah_single_2": OF_RULER,
    "niah_single_3": OF_RULER | {"values": "uuids", "value": UUID},
    "niah_multikey_1": OF_RULER | {"needles": 4},
    "niah_multikey_2": OF_RULER | {"needles": None},
    "niah_multikey_3": OF_RULER | {"values": "uuids", "value": UUID, "keys": UUID, "needles": None},
    "niah_multivalue": OF_RULER | {"needles": 4, "answers": 4},
    "niah_multiquery": OF_RULER | {"needles": 4, "asked": 4, "answers": 4},
}
"""What RULER's synthetic.yaml says; None needles fill the haystack."""

ONE = (
    "A special magic {0} is hidden within the following text. Make sure to memorize it. I will quiz you about the {0} "
    "afterwards.\n",
    "\nWhat is the special magic {0} for {1} mentioned in the provided text?",
    "The special magic {0} for {1} mentioned in the provided text is",
)
SEVERAL = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the numbers afterwards.\n",
    "\nWhat are all the special magic numbers for {1} mentioned in the provided text?",
    "The special magic numbers for {1} mentioned in the provided text are",
)


@pytest.fixture(scope="module")
def data(tokenizer):
    return Ruler13(tokenizer=tokenizer, max_tokens=BUDGET, tasks=SIZED_NAMES, train=22, val=11, test=22)


@pytest.fixture(scope="module")
def examples(data):
    """Records of the test, examples and both parts of their texts, by task."""
    found = {name: [] for name in SIZED_NAMES}
    for record in data.records("test"):
        example = data.to_example(record)
        ids, length = example["input_ids"], example["prompt_length"]
        decode = data.tokenizer.decode
        found[record.task].append((record, example, decode(ids[:length]), decode(ids[length:])))
    return found


def test_the_names_are_rulers():
    assert (*TABLE, "vt", "cwe", "fwe", "qa_1", "qa_2") == RULER13
    assert len(RULER13) == 13


@pytest.mark.parametrize("name", TABLE)
def test_needles_read_as_rulers_do(name, examples):
    about = TABLE[name]
    for record, example, prompt, answer in examples[name]:
        before, behind, beginning = SEVERAL if about["answers"] > 1 else ONE
        what = (about["values"].removesuffix("s"), record.question)
        head = f"{BEGIN}{before.format(*what)}"
        tail = f"{behind.format(*what)}{TURN}{beginning.format(*what)}"
        assert prompt.startswith(head)
        assert prompt.endswith(tail)
        context = prompt.removeprefix(head).removesuffix(tail)
        pattern = rf"One of the special magic {about['values']} for ({about['keys']}) is: ({about['value']})\."
        needles = re.findall(pattern, context)
        asked = re.findall(about["keys"], record.question)
        assert len(asked) == about["asked"]
        assert len({value for _, value in needles}) == len(needles) == (about["needles"] or len(needles))
        # A key has all values that are asked for, and each of them once.
        held = [value for key in asked for own, value in needles if own == key]
        assert tuple(held) == record.answers == tuple(example["answers"])
        assert len(held) == about["answers"]
        assert answer == f" {', '.join(held)}<|im_end|>"
        spans = [data_text(prompt, span) for span in example["gold_spans"]]
        assert sorted(re.fullmatch(pattern, span)[2] for span in spans) == sorted(held)


def data_text(prompt: str, span: tuple[int, int]) -> str:
    """A token of the tests' tokenizer is a byte."""
    start, end = span
    return prompt.replace("<|im_start|>", "\0").replace("<|im_end|>", "\0").encode()[start:end].decode()


def test_haystacks_are_rulers(examples):
    def context(prompt: str) -> str:
        return prompt.partition("afterwards.\n")[2].rpartition("\nWhat")[0]

    for _, _, prompt, _ in examples["niah_single_1"]:
        assert Counter(context(prompt).split("\n")).most_common(1)[0][0] == NOISE
        assert len(set(context(prompt).split("\n"))) == 2
    for name in ("niah_multikey_2", "niah_multikey_3"):
        for _, _, prompt, _ in examples[name]:
            assert all(line.startswith("One of the special magic") for line in context(prompt).split("\n"))
    firsts = {
        context(prompt)[:50] for name in NIAH for _, _, prompt, _ in examples[name] if "\n" not in context(prompt)
    }
    assert len(firsts) == 10
    assert all(NOISE not in first for first in firsts)


def test_a_chain_reads_as_rulers_does():
    record = variable_tracking("id", random.Random(1), 20, BUDGET)
    text = "".join(passage.text for passage in record.passages)
    noise = f"{NOISE}\n"
    solved, task = text.split("\n\n\n\n")
    begin = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    shown = re.fullmatch(
        rf"{re.escape(begin)}(.*)\n"
        r"Question: Find all variables that are assigned the value (\d{5}) in the text above\. "
        r"Answer: According to the chain\(s\) of variable assignment in the text above, 5 variables are assgined the "
        r"value (\d{5}), they are:  ([A-Z]{3}(?: [A-Z]{3}){4})",
        solved,
        re.DOTALL,
    )
    assert shown[2] == shown[3]
    for context, lines, value, variables in (
        (shown[1], 10, shown[2], shown[4].split()),
        (task.removeprefix(begin), 20, record.question, list(record.answers)),
    ):
        assert context.count(noise) == lines
        # What is left once the noise is gone, each with the blank behind it.
        first, *hops = re.findall(r"VAR [A-Z]+ = (?:\d+ |VAR [A-Z]+  )", context)
        assert first == f"VAR {variables[0]} = {value} "
        pairs = zip(variables[1:], variables, strict=False)
        assert hops == [f"VAR {new} = VAR {old}  " for new, old in pairs]
        rest = context
        for part in (first, *hops):
            assert rest.count(part) == 1
            rest = rest.replace(part, "")
        assert rest == " ".join([noise] * lines)


def test_prompts_of_the_others_read_as_rulers_do(examples):
    for record, _, prompt, answer in examples["vt"]:
        assert prompt.startswith(
            f"{BEGIN}Memorize and track the chain(s) of variable assignment hidden in the following"
        )
        assert prompt.endswith(
            f"\nQuestion: Find all variables that are assigned the value {record.question} in the text above.{TURN}"
            "Answer: According to the chain(s) of variable assignment in the text above, 5 variables are assgined the "
            f"value {record.question}, they are:"
        )
        assert answer == f" {', '.join(record.answers)}<|im_end|>"
    for _, _, prompt, _ in examples["cwe"]:
        solved = "\nQuestion: What are the 10 most common words in the above list? "
        solved += "Answer: The top 10 words that appear most often in the list are:1. "
        assert prompt.count(solved) == 1


def test_the_rest_is_that_of_the_older_tasks(tokenizer):
    data = Ruler13(tokenizer=tokenizer, max_tokens=BUDGET, tasks=["fwe", "qa_1"])
    assert data.sized_tasks["fwe"] is WORD_TASKS["frequent_words"]
    assert data.qa_tasks == {"qa_1": QA_TASKS["qa_squad"], "qa_2": QA_TASKS["qa_hotpotqa"]}
    example = data.to_example(data.records("test")[1])
    assert (example["task"], example["match"]) == ("qa_1", "any")
    prompt = tokenizer.decode(example["input_ids"][: example["prompt_length"]])
    assert prompt.endswith(f"{TURN}Answer:")
    assert example["subject"] in {article_of(article[0]) for article in SquadArticles().articles("test")}


def test_contexts_fill_the_budget_and_are_each_of_their_own(examples):
    found = [entry for name in SIZED_NAMES for entry in examples[name]]
    for record, example, prompt, _ in found:
        # The longest step is a needle of two UUIDs.
        assert 0.96 * BUDGET < len(example["input_ids"]) <= BUDGET
        assert recall(prompt, record.answers, record.match) == 1.0
    assert SplitFacts.of(example for _, example, _, _ in found).contexts == list(range(len(found)))


def test_the_seed_decides_and_splits_differ(data, tokenizer):
    same, other = (
        Ruler13(tokenizer=tokenizer, max_tokens=BUDGET, tasks=SIZED_NAMES, test=22, seed=seed) for seed in (0, 1)
    )
    assert data.records("test") == same.records("test")
    answers = [{record.answers for record in data.records(split)} for split in ("train", "val", "test")]
    answers.append({record.answers for record in other.records("test")})
    assert len(set().union(*answers)) == sum(map(len, answers)) == 22 + 11 + 22 + 22


@pytest.mark.parametrize("name", [name for name in NIAH if name != "niah_single_1"])
def test_needles_and_their_order_do_not_depend_on_the_size(name, data):
    task = data.sized_tasks[name]
    small, large = (task.make("id", random.Random(5), size, BUDGET) for size in (40, 90))
    assert (small.question, small.answers) == (large.question, large.answers)
    needles = [[piece.text for piece in record.passages if piece.title] for record in (small, large)]
    assert needles[0] == needles[1]


def test_depths_are_anywhere(data):
    task = data.sized_tasks["niah_single_2"]
    depths = []
    for seed in range(60):
        record = task.make("id", random.Random(seed), 400, BUDGET)
        text = "".join(piece.text for piece in record.passages)
        depths.append(text.index("One of the special") / len(text))
    assert min(depths) < 0.05
    assert max(depths) > 0.9
    assert 0.4 < sum(depths) / len(depths) < 0.6


def test_an_essay_goes_round_and_begins_with_a_sentence():
    words = ["a", "b.", "c", "d!", "e", "f?"]
    found = [essay(words, random.Random(seed), 9) for seed in range(20)]
    assert all(sum(len(sentence.split()) for sentence in sentences) == 9 for sentences in found)
    assert {sentences[0] for sentences in found} == {"a b.", "c d!", "e f?"}
    assert ["c d!", "e f?", "a b.", "c d!", "e"] in found
    assert essay(["no", "end"], random.Random(0), 3) == ["no end no"]


def test_a_text_in_pieces_is_the_text():
    sentences = [("n1", True), ("n2", True), ("a", False), ("b", False), ("n3", True)]
    pieces = in_pieces(sentences, "\n")
    assert "".join(piece.text for piece in pieces) == "n1\nn2\na\nb\nn3"
    assert [(piece.title, piece.text) for piece in pieces if piece.title] == [
        ("Needle 1", "n1"),
        ("Needle 2", "n2"),
        ("Needle 3", "n3"),
    ]


def test_what_does_not_fit_is_told(tokenizer):
    data = Ruler13(tokenizer=tokenizer, max_tokens=2000, tasks=["vt"])
    found = data.to_example(data.records("test")[0])
    assert isinstance(found, TooLong)
    assert found.tokens > 2000


def test_each_task_has_a_score_of_its_own(data):
    assert {data.score_of(name) for name in RULER13} == {"recall"}


@pytest.mark.parametrize(
    ("content", "parameters", "field"),
    [
        ("{}", {"tasks": ["niah_single"]}, "tasks"),
        ('{"text": ["a"]}', {}, None),
        ('{"text": " "}', {}, "source"),
        ("[]", {}, None),
    ],
)
def test_bad_input_is_refused(content, parameters, field, tmp_path):
    path = tmp_path / "essays.json"
    path.write_text(content)
    with refused(field or str(path)):
        Ruler13(source=str(path), sha256=None, **parameters).records("test")
