"""Which rewriting is preferred, by recorded cases and by what must hold of any; and data of such pairs."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from helpers import refused
from hypothesis import given
from hypothesis import strategies as st

from lrsa_lit.data import Mixture, PreferencePairs
from lrsa_lit.data.policies import Packed
from lrsa_lit.data.preferences import PROMPT, Candidate, PreferencePair, in_two, preferred
from lrsa_lit.errors import UserError
from lrsa_lit.models.tiny import tiny_tokenizer

RECORDED = json.loads((Path(__file__).parents[1] / "vectors/systems/color.json").read_text())["pairs"]
TOKENIZER = tiny_tokenizer()


def names(found):
    return found and {"chosen": found[0].by, "rejected": found[1].by}


@pytest.mark.parametrize("case", RECORDED, ids=["some succeed", "all succeed", "all fail"])
def test_recorded_pairs(case):
    candidates = [Candidate(one["name"], one["name"] * one["length"], one["success"]) for one in case["candidates"]]
    always = {name: case[name] for name in ("chosen", "rejected") if name in case}
    assert names(preferred(candidates)) == case.get("hard", always)
    assert names(preferred(candidates, hard=False)) == case.get("weak", case.get("hard", always))


MADE = st.builds(
    Candidate, by=st.sampled_from("abcdef"), text=st.text("xy", min_size=1, max_size=6), success=st.booleans()
)


@given(st.lists(MADE, max_size=8), st.booleans())
def test_what_holds_of_any_pair(candidates, hard):
    found = preferred(candidates, hard=hard)
    mixed = {each.success for each in candidates} == {True, False}
    good, bad = ([each for each in candidates if not mixed or each.success == success] for success in (True, False))
    if found is None:
        # Only where nothing succeeds, or the shortest success and the longest failure may be one text.
        none = hard and not any(each.success for each in candidates)
        shortest, longest = (
            choose((len(one.text) for one in of), default=0) for choose, of in ((min, good), (max, bad))
        )
        assert none or shortest == longest
        return
    chosen, rejected = found
    assert chosen.text != rejected.text
    assert chosen in good
    assert rejected in bad
    assert len(chosen.text) == min(len(each.text) for each in good)
    assert len(rejected.text) == max(len(each.text) for each in bad)
    assert any(each.success for each in candidates) or not hard


def test_a_success_that_is_longer_than_the_failure_is_chosen():
    long, short = Candidate("a", "a long text", True), Candidate("b", "short", False)
    assert preferred([long, short]) == (long, short)


def test_equal_texts_are_no_pair():
    assert preferred([Candidate("a", "same", True), Candidate("b", "same", False)]) is None
    assert preferred([Candidate("a", "same", True)]) is None
    assert preferred([]) is None


PAIRS = st.lists(
    st.builds(
        PreferencePair,
        passage=st.sampled_from("pqrstuv"),
        chosen=st.sampled_from("ab"),
        rejected=st.sampled_from("cd"),
        title=st.sampled_from(["", "T", "U", "V"]),
    ),
    max_size=20,
)


@given(PAIRS, st.floats(0.05, 0.5), st.integers(0, 3))
def test_no_passage_is_trained_on_and_held_out(pairs, share, seed):
    try:
        train, held = in_two(pairs, share, seed)
    except UserError:
        # Those that are connected by passages or titles are all of them, or more than may be left to train on.
        return
    assert train
    assert held
    assert sorted(map(repr, [*train, *held])) == sorted(map(repr, set(pairs)))
    assert len(held) >= share * len(set(pairs))
    assert not {pair.passage for pair in train} & {pair.passage for pair in held}
    assert not {pair.title for pair in train if pair.title} & {pair.title for pair in held}
    assert (train, held) == in_two(pairs, share, seed)


def test_pairs_of_one_passage_cannot_be_split():
    pair = PreferencePair("p", "a", "b")
    with refused("pairs"):
        in_two([pair, replace(pair, chosen="c")], 0.1, 0)


def data(tmp_path, rows, **options):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return PreferencePairs(train=str(tmp_path / "pairs.jsonl"), tokenizer=TOKENIZER, **options)


ROW = {"passage": "The {ferry} leaves at noon.", "chosen": "Noon.", "rejected": "A ferry, it seems."}


def test_both_answers_stand_behind_one_prompt(tmp_path):
    found = data(tmp_path, [ROW])
    (record,) = found.records("train")
    example = found.to_example(record)
    prompt = TOKENIZER.decode(example["input_ids"][: example["prompt_length"]])
    assert PROMPT.format(passage=ROW["passage"]) in prompt
    assert TOKENIZER.decode(example["input_ids"][example["prompt_length"] :]) == f"Noon.{TOKENIZER.eos_token}"
    assert TOKENIZER.decode(example["rejected"]) == f"A ferry, it seems.{TOKENIZER.eos_token}"


def test_a_pair_is_left_out_if_either_answer_is_too_long(tmp_path, monkeypatch):
    monkeypatch.setenv("LRSA_CACHE_DIR", str(tmp_path / "cache"))
    long = "A ferry, it seems. " * 30
    found = data(tmp_path, [ROW, ROW | {"chosen": long}, ROW | {"rejected": long}], max_tokens=300)
    found.prepare_data()
    found.setup()
    assert found.report["train"]["kept"] == 1
    assert found.report["train"]["too_long"] == 2
    (batch,) = found.train_dataloader()
    assert [len(batch[name]) for name in ("input_ids", "id", "sizes", "rejected")] == [2, 1, 1, 1]
    assert batch["step_sizes"] == batch["sizes"]
    assert batch["sizes"][0].rejected == len("A ferry, it seems.") + 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rejected": "Noon. "}, "is the same text as chosen"),
        ({"chosen": " "}, "chosen: is empty"),
        ({"summary": "x"}, "summary: no such field"),
        ({"passage": 3}, "passage: is int"),
    ],
)
def test_what_is_no_pair_is_refused_with_its_place(tmp_path, change, said):
    with refused(f"{tmp_path}/pairs.jsonl, line 2", reason=said):
        list(data(tmp_path, [ROW, ROW | change]).records("train"))


def test_a_pair_is_read_as_it_is_written():
    pair = PreferencePair("p", "a", "b", "T", "lead", "sample-1")
    assert PreferencePair.from_dict(json.loads(json.dumps(asdict(pair)))) == pair


def test_pairs_are_not_packed(tmp_path):
    with refused("packing"):
        data(tmp_path, [ROW], packing=Packed(900))
    with refused("packing"):
        Mixture({"pairs": data(tmp_path, [ROW])}, {"pairs": 1.0}, packing=Packed(900))
