"""RULER's aggregation and question answering; tests/data/test_needle.py has retrieval and tracing."""

import random
import re
from collections import Counter
from functools import partial

import pytest
from helpers import refused

from lrsa_lit.data.needle import Needles
from lrsa_lit.data.prompts import TooLong, encode
from lrsa_lit.data.qa_tasks import QA_TASKS
from lrsa_lit.data.records import QARecord
from lrsa_lit.data.ruler import RULER_TASKS, Ruler
from lrsa_lit.data.sized import largest
from lrsa_lit.data.split_facts import SplitFacts
from lrsa_lit.data.squad import SquadArticles, article_of
from lrsa_lit.data.word_tasks import WORD_TASKS, common_words, frequent_words
from lrsa_lit.evaluation.answer_scores import recall

BUDGET = 3000


@pytest.fixture(scope="module")
def data(tokenizer):
    return Ruler(tokenizer=tokenizer, max_tokens=BUDGET, train=9, val=9, test=18)


@pytest.fixture(scope="module")
def examples(data):
    """Those of the test split, in order."""
    return [data.to_example(record) for record in data.records("test")]


@pytest.fixture(scope="module")
def texts(data, tokenizer):
    """A prompt of each task."""
    found = {}
    for record in data.records("val"):
        example = data.to_example(record)
        found[record.task] = tokenizer.decode(example["input_ids"][: example["prompt_length"]])
    return found


@pytest.fixture(scope="module")
def documents():
    return {name: make(0, 0.1, 0.1) for name, make in QA_TASKS.items()}


def listed(text: str) -> list[str]:
    """The words of the last numbered list of a text, whose numbers are checked."""
    items = re.findall(r"(\d+)\. ([a-z-]+)", text[text.rindex("Memorize the ones") :])
    assert [int(number) for number, _ in items] == list(range(1, len(items) + 1))
    return [word for _, word in items]


def draw(name: str, size: int, max_tokens: int, seed: int = 0) -> QARecord:
    make, _, _ = WORD_TASKS[name]
    return make("id", random.Random(seed), size, max_tokens)


@pytest.mark.parametrize(("max_tokens", "often", "seldom"), [(4095, 6, 1), (4096, 30, 3), (100_000, 30, 3)])
@pytest.mark.parametrize("size", [10, 77])
def test_common_words_stand_as_often_as_rulers(max_tokens, often, seldom, size):
    record = draw("common_words", size, max_tokens)
    counts = Counter(listed(record.passages[0].text))
    assert [word for word, _ in counts.most_common(10)] == [w for w in counts if w in record.answers]
    assert {counts.pop(word) for word in record.answers} == {often}
    assert set(counts.values()) == {seldom}
    assert len(counts) == size
    assert record.match == "all"


def test_the_solved_example_of_common_words_is_right_and_shares_no_word():
    record = draw("common_words", 50, 4096)
    text = record.passages[0].text
    solved, question, given = re.search(
        r"Memorize the ones that appear most often\.\n(.*)\nQuestion: (.*\?) Answer: The top 10 words .* are: (.*)\n",
        text,
    ).groups()
    counts = Counter(re.findall(r"[a-z]+", solved))
    answers = re.findall(r"\d+\. ([a-z]+)", given)
    assert question == record.question
    assert [word for word, _ in counts.most_common(10)] == [word for word in counts if word in answers]
    assert ({counts[word] for word in answers}, len(answers), len(counts)) == ({10}, 10, 40)
    assert not counts.keys() & set(listed(text))


def test_a_list_goes_on_when_the_words_run_out():
    words = Counter(listed(draw("common_words", 20_000, 10**6).passages[0].text))
    assert len(words) == 20_010
    assert 5000 < sum("-" not in word for word in words) < 10_000


@pytest.mark.parametrize("size", [80, 81, 300, 5000])
@pytest.mark.parametrize("max_tokens", [100, 2048, 32_768])
def test_frequent_words_are_the_most_frequent_after_the_noise(size, max_tokens):
    record = draw("frequent_words", size, max_tokens)
    words = record.passages[0].text.split(" ")
    (noise, first), *ranked = Counter(words).most_common(5)
    assert noise == "..."
    assert tuple(word for word, _ in ranked[:3]) == record.answers
    # Zipf's law with exponent 2: a quarter, a ninth and a sixteenth as often; no ties around the answers.
    counts = [count for _, count in ranked]
    assert counts == sorted(set(counts), reverse=True)
    assert counts[:3] == pytest.approx([first / 4, first / 9, first / 16], abs=1)
    assert len(set(words)) <= max(max_tokens // 50, 5)
    assert all(re.fullmatch("[a-z]{6}", word) for word in set(words) - {"..."})


@pytest.mark.parametrize("make", [common_words, frequent_words])
def test_the_size_does_not_change_the_answers_and_the_seed_does(make):
    small, large = (make("id", random.Random(3), size, 4096) for size in (100, 150))
    assert small.answers == large.answers
    assert len(small.passages[0].text) < len(large.passages[0].text)
    assert make("id", random.Random(3), 100, 4096) == small
    assert make("id", random.Random(4), 100, 4096).answers != small.answers


@pytest.mark.parametrize("name", WORD_TASKS)
@pytest.mark.parametrize("max_tokens", [2500, 3333, 20_000])
def test_no_larger_record_would_fit(name, max_tokens, tokenizer):
    _, smallest, prompt = WORD_TASKS[name]
    sizes = []

    def make(size: int) -> QARecord:
        sizes.append(size)
        return draw(name, size, max_tokens)

    largest_record, example = largest(make, smallest, prompt, tokenizer, max_tokens)
    lengths = {size: encode(draw(name, size, max_tokens), tokenizer, 10**6, prompt) for size in set(sizes)}
    fitting = [size for size, found in lengths.items() if len(found["input_ids"]) <= max_tokens]
    assert example == lengths[max(fitting)]
    assert largest_record == draw(name, max(fitting), max_tokens)
    assert len(lengths[min(set(sizes) - set(fitting))]["input_ids"]) > max_tokens
    assert max(fitting) + 1 in sizes
    assert len(sizes) < 15


def test_words_that_do_not_fit_at_all_are_said_to(tokenizer):
    _, smallest, prompt = WORD_TASKS["frequent_words"]
    _, found = largest(partial(draw, "frequent_words", max_tokens=700), smallest, prompt, tokenizer, 700)
    assert isinstance(found, TooLong)
    assert found.tokens > 700


@pytest.mark.parametrize("name", QA_TASKS)
@pytest.mark.parametrize("max_tokens", [2500, 12_000])
def test_the_documents_of_a_question_are_among_others(name, max_tokens, documents, tokenizer):
    places = []
    for record in documents[name].questions["test"][:8]:
        _, example = documents[name].fill(record, random.Random(record.id), tokenizer, max_tokens)
        text = tokenizer.decode(example["input_ids"][: example["prompt_length"]])
        blocks = re.split(r"\n\nDocument (\d+):\n", text)
        numbers, bodies = blocks[1::2], blocks[2::2]
        assert [int(number) for number in numbers] == list(range(1, len(bodies) + 1))
        bodies[-1] = bodies[-1].partition("\n\nAnswer the question based on the given documents")[0]
        gold = [p.text.strip() for p in record.passages if p.title in record.supporting_titles]
        assert all(bodies.count(body) == 1 for body in gold)
        spans = [tokenizer.decode(example["input_ids"][start:end]) for start, end in example["gold_spans"]]
        assert sorted(span.partition(":\n")[2] for span in spans) == sorted(gold)
        assert len(set(bodies)) == len(bodies)
        assert 0.8 * max_tokens < len(example["input_ids"]) <= max_tokens
        places += [bodies.index(body) / len(bodies) for body in gold]
    assert min(places) < 0.4
    assert max(places) > 0.6


def test_documents_of_the_same_article_come_first(documents, tokenizer):
    record = documents["qa_hotpotqa"].questions["test"][0]
    _, example = documents["qa_hotpotqa"].fill(record, random.Random(0), tokenizer, 30_000)
    text = tokenizer.decode(example["input_ids"])
    assert all(passage.text.strip() in text for passage in record.passages)
    assert len(record.passages) == 10


@pytest.mark.parametrize("name", QA_TASKS)
def test_questions_are_in_one_split_only(name, documents):
    seen = [{record.id for record in records} for records in documents[name].questions.values()]
    assert sum(map(len, seen)) == len(set.union(*seen)) > 5000
    assert all(seen)


def test_a_question_of_squad_has_its_article_as_subject(data, examples):
    named = [(record.id, example) for record, example in zip(data.records("test"), examples, strict=True)]
    subjects = {example.get("subject") for name, example in named if "qa_squad" in name}
    articles = SquadArticles().articles("test")
    assert subjects <= {article[0].passages[0].title.removesuffix(" (1)") for article in articles}
    assert all(subjects)
    assert all("subject" not in example for name, example in named if "qa_squad" not in name)


def test_shares_decide_how_many_articles_are_asked_about(tokenizer):
    options = {"tokenizer": tokenizer, "max_tokens": BUDGET, "tasks": ["qa_squad"], "test": 600}
    few, most = (
        {article_of(record) for record in Ruler(**options, **shares).records("test")}
        for shares in ({}, {"val_fraction": 0.0, "test_fraction": 0.95})
    )
    assert len(few) == 4
    assert len(most) == 34


def test_prompts_read_as_rulers_do(texts):
    begin, turn = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    asked = (
        "Answer the question based on the given documents. Only give me the answer and do not output any other words."
    )
    assert texts["common_words"].startswith(
        f"{begin}Below is a numbered list of words. In these words, some appear more"
    )
    assert texts["common_words"].endswith(
        "\nQuestion: What are the 10 most common words in the above list?"
        f"{turn}Answer: The top 10 words that appear most often in the list are:"
    )
    assert texts["frequent_words"].startswith(
        f"{begin}Read the following coded text and track the frequency of each coded word. "
        "Find the three most frequently appeared coded words. "
    )
    assert texts["frequent_words"].endswith(
        "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
        f"appeared words in the above coded text?{turn}Answer: According to the coded text above, the three most "
        "frequently appeared words are:"
    )
    for name in QA_TASKS:
        assert texts[name].startswith(f"{begin}{asked}\n\nThe following are given documents.\n\nDocument 1:\n")
        assert re.search(rf"\n\n{re.escape(asked)}\n\nQuestion: [^\n]+{re.escape(turn)}Answer:$", texts[name])


def test_examples_fill_the_budget_and_hold_the_answers(data, examples, tokenizer):
    for record, example in zip(data.records("test"), examples, strict=True):
        context = tokenizer.decode(example["input_ids"][: example["prompt_length"]])
        assert example["task"] == record.task
        assert example["answers"] == list(record.answers)
        assert 0.8 * BUDGET < len(example["input_ids"]) <= BUDGET
        if record.answers[0] not in ("yes", "no"):
            assert recall(context, record.answers, record.match) == 1.0
        learnt = tokenizer.decode(example["input_ids"][example["prompt_length"] :])
        blank = " " if record.task in {*WORD_TASKS, *QA_TASKS} else ""
        assert learnt == f"{blank}{record.target}<|im_end|>"


def test_examples_are_those_that_published_results_name(examples):
    found = {name: [] for name in RULER_TASKS}
    for example in examples:
        found[example["task"]].append(example)
    assert {name: SplitFacts.of(examples).digest for name, examples in found.items()} == {
        "niah_single": "2d70ea8458fa",
        "niah_multikey": "e415f8a63415",
        "niah_multivalue": "eab33431a0df",
        "niah_multiquery": "c4efff64343f",
        "variable_tracking": "f1ccfd180722",
        "common_words": "dd5582d47449",
        "frequent_words": "dcc768949668",
        "qa_squad": "ed585260fd89",
        "qa_hotpotqa": "c11f70b0b7de",
    }


def test_tasks_take_turns_and_the_seed_decides(data, examples, tokenizer):
    assert [record.task for record in data.records("test")] == [*RULER_TASKS, *RULER_TASKS]
    assert len({record.id for record in data.records("test")}) == 18
    same = Ruler(tokenizer=tokenizer, max_tokens=BUDGET, test=18)
    other = Ruler(tokenizer=tokenizer, max_tokens=BUDGET, test=18, seed=1)
    assert same.records("test") == data.records("test")
    assert [same.to_example(record) for record in same.records("test")] == examples
    answers = [[record.answers for record in module.records("test")] for module in (same, other)]
    assert sum(a == b for a, b in zip(*answers, strict=True)) <= 2  # both may ask for "yes"


def test_the_needles_are_those_of_the_needles(tokenizer):
    options = {"tokenizer": tokenizer, "max_tokens": 2000, "tasks": ["niah_multikey", "variable_tracking"], "test": 4}
    ruler, needles = Ruler(**options), Needles(**options)
    assert [ruler.to_example(r) for r in ruler.records("test")] == [
        needles.to_example(r) for r in needles.records("test")
    ]


def test_each_task_has_a_score_of_its_own(data):
    data.prepare_data("test")
    data.setup("test")
    assert data.groups("test") == list(RULER_TASKS)
    assert {data.score_of(group) for group in data.groups("test")} == {"recall"}


@pytest.mark.parametrize(
    ("parameters", "field", "value"),
    [
        ({"tasks": ["cwe"]}, "tasks", ["cwe"]),
        ({"test_fraction": 1.0}, "test_fraction", 1.0),
        ({"tasks": ["qa_squad"], "test": 5000}, "test", 5000),
    ],
)
def test_a_bad_parameter_is_refused(parameters, field, value):
    with refused(field, value):
        Ruler(**parameters).records("test")
