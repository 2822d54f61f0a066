import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lrsa_lit.data.filters import BM25, RandomSentences, SentenceFilter
from lrsa_lit.data.filters.sentence_filter import ranked, selected
from lrsa_lit.data.prompts import PROMPT
from lrsa_lit.data.records import Passage, QARecord
from lrsa_lit.errors import UserError
from lrsa_lit.models.tiny import tiny_tokenizer

RECORDED = json.loads((Path(__file__).parents[2] / "vectors/systems/cpc.json").read_text())
TOKENIZER = tiny_tokenizer()


def test_the_order_is_the_recorded_one():
    similarity = RECORDED["similarity"]
    assert ranked(similarity, [False] * len(similarity)) == RECORDED["order"]


@pytest.mark.parametrize("rule", ["published", "strict"])
def test_both_rules_keep_what_is_recorded(rule):
    recorded = RECORDED[f"{rule}_rule"]
    found = {
        budget: sorted(selected(RECORDED["order"], RECORDED["sentence_tokens"], int(budget), rule))
        for budget in recorded
    }
    assert found == recorded


def test_equal_scores_rank_the_earlier_first_and_forced_ones_before_all():
    assert ranked([1.0, 2.0, 1.0, 0.0], [False, False, False, True]) == [3, 1, 0, 2]


def test_a_title_is_paid_for_once():
    lengths, places, titles = [3, 3, 3], [0, 1, 0], [2, 2]
    assert selected([0, 1, 2], lengths, 8, "strict", places, titles) == [0, 2]
    assert selected([0, 1, 2], lengths, 13, "strict", places, titles) == [0, 1, 2]
    assert selected([0, 1, 2], lengths, 7, "published", places, titles) == [0, 1]


lists = st.lists(st.integers(0, 9), min_size=1, max_size=8)


@given(lists, st.integers(0, 40), st.randoms())
def test_the_strict_rule_never_exceeds_and_leaves_out_only_what_does_not_fit(lengths, budget, rng):
    order = rng.sample(range(len(lengths)), len(lengths))
    kept = selected(order, lengths, budget, "strict")
    taken = 0
    for position in order:
        if position in kept:
            taken += lengths[position]
        else:
            assert taken + lengths[position] > budget
    assert taken <= budget


@dataclass(frozen=True)
class Longest(SentenceFilter):
    def scores(self, record, sentences):
        return [float(len(sentence.text)) for sentence in sentences]


def record(*texts, title="T"):
    return QARecord("r", tuple(Passage(title and f"{title}{n}", text) for n, text in enumerate(texts)), "Q?", ("a",))


def applied(shortens, given):
    shortens.use(TOKENIZER)
    return [(passage.title, passage.text) for passage in shortens.apply(given).passages]


def test_sentences_stay_in_order_under_their_titles():
    texts = record("One. Longest of all. Two.", "Xx.", "Longer one. Y.")
    # A title takes five bytes: an empty line before it, two letters, a line end.
    assert applied(Longest(tokens=38), texts) == [("T0", "Longest of all. "), ("T2", "Longer one. ")]


def test_a_sentence_above_the_budget_is_cut_into_pieces_that_rank_apart():
    long = "a few words and a great many more words that go on"
    (left,) = applied(Longest(tokens=20), record("Short.", long))
    assert left[0] == "T1"
    assert left[1].strip() in long
    assert 10 < len(left[1]) <= 15


def test_forced_sentences_come_first():
    texts = record("A long sentence is here. Note: six. Another long sentence.")
    assert applied(Longest(tokens=30, forced="^Note"), texts) == [("T0", "Note: six. ")]
    with pytest.raises(UserError, match=r"^forced: '\(' is invalid .*; it must be a regular expression$"):
        Longest(forced="(")
    with pytest.raises(UserError, match=r"^rule: 'loose' is not allowed; it must be strict or published$"):
        Longest(rule="loose")


def test_what_fits_is_left_as_it_is_and_a_passage_without_text_is_not_worth_its_title():
    texts = record("One. Two.", " ", "Three.")
    assert Longest(tokens=99).budget(50, texts, PROMPT) == 50
    assert applied(Longest(tokens=99), texts) == [("T0", "One. Two."), ("T1", " "), ("T2", "Three.")]
    assert applied(Longest(tokens=26), texts) == [("T0", "One. Two."), ("T2", "Three.")]


def test_a_budget_below_a_title_leaves_nothing():
    assert applied(Longest(tokens=4), record("One. Two.")) == []


def test_the_published_rule_keeps_one_sentence_at_least():
    assert applied(Longest(tokens=1, rule="published"), record("One. Two.", title="")) != []


def test_another_seed_or_record_keeps_other_sentences():
    texts = record(*(f"Sentence {n}. " * 3 for n in range(20)))
    kept = [applied(RandomSentences(seed=seed), texts) for seed in (0, 0, 1)]
    assert kept[0] == kept[1] != kept[2]


def test_bm25_reads_titles_and_the_last_question():
    texts = QARecord("r", (Passage("Isk", "It is long."), Passage("Orda", "It is wide.")), "How wide is Orda?", ("a",))
    assert applied(BM25(kept=0.6), texts) == [("Orda", "It is wide.")]


@pytest.mark.parametrize(("name", "wrong"), [("k1", -1.0), ("b", 1.5)])
def test_bounds(name, wrong):
    with pytest.raises(UserError, match=f"^{name}: {wrong} is not allowed"):
        BM25(**{name: wrong})


texts = st.lists(st.sampled_from(["Cde. ", "Cde Cde. ", "Ab. "]), min_size=1, max_size=16).map("".join)


@given(st.lists(texts, min_size=1, max_size=3), st.integers(4, 40))
@example(["Cde. " * 12], 30)
def test_the_budget_holds_where_tokens_merge(merging, texts, budget):
    shortens = RandomSentences(tokens=budget)
    shortens.use(merging)
    found = shortens.filtered(record(*texts, title=""))
    assert found.tokens_left <= budget
    assert found.tokens <= budget or found.dropped
