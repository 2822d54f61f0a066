"""Plain texts in pieces: each token is learnt once."""

import json
import math

import pytest
from helpers import refused
from hypothesis import given
from hypothesis import strategies as st

from lrsa_lit.data import Articles, Mixture, QAFiles, TextFiles
from lrsa_lit.data.collate import collate_training, learnt_spans
from lrsa_lit.evaluation.answers import perplexity
from lrsa_lit.models.tiny import tiny_tokenizer


def beginning():
    """A tokenizer that puts a token before every text, as Llama's does."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|im_start|> $A",
                                                                    special_tokens=[("<|im_start|>", 1)])  # fmt: skip
    return tokenizer


TOKENIZERS = {"bare": tiny_tokenizer, "begins": beginning}


def pieces(split="train", **options):
    data = TextFiles(**{split: options.pop("path"), "tokenizer": tiny_tokenizer(), **options})
    return [data.to_example(record) for record in data.records(split)]


@pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)
@given(text=st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip), max_tokens=st.integers(3, 40))
def test_each_token_but_the_first_is_learnt_once_from_those_before_it(make, text, max_tokens, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "text.txt"
    path.write_bytes(text.encode())
    tokenizer = make()
    found = pieces(path=str(path), tokenizer=tokenizer, max_tokens=max_tokens)
    ids = tokenizer(text.removeprefix("\ufeff"), add_special_tokens=False)["input_ids"]
    before = [1] if make is beginning else []
    learnt = []
    for example in found:
        ((start, end),) = learnt_spans(example)
        assert end == len(example["input_ids"]) <= max_tokens
        assert example["input_ids"][: len(before)] == before
        seen = learnt if before else [*ids[:1], *learnt]
        # What a piece begins with is the last token of the one before.
        assert example["input_ids"][len(before) : start] == (seen[-1:] if start > len(before) else [])
        learnt += example["input_ids"][start:]
    assert learnt == ids[1 - len(before) :]
    assert all(len(example["input_ids"]) == max_tokens for example in found[:-1])


def test_texts_are_rows_or_files_of_a_folder(tmp_path):
    (tmp_path / "b.txt").write_bytes("Zwei\r\n\ufeffé".encode())
    (tmp_path / "a.jsonl").write_text('\ufeff{"text": "eins <|im_end|>", "url": "x"}\n\n{"text": "drei"}\n', "utf-8")
    (tmp_path / "notes.md").write_text("no text of the data")
    tokenizer = tiny_tokenizer()
    found = pieces(path=str(tmp_path))
    assert [tokenizer.decode(example["input_ids"]) for example in found] == [
        "eins <|im_end|>",
        "drei",
        "Zwei\r\n\ufeffé",
    ]
    assert [example["id"] for example in found] == ["train-1-1", "train-2-1", "train-3-1"]
    assert tokenizer.eos_token_id not in found[0]["input_ids"]
    both = pieces(path=[str(tmp_path / "b.txt"), str(tmp_path / "a.jsonl")])
    assert [len(example["input_ids"]) for example in both] == [len(found[n]["input_ids"]) for n in (2, 0, 1)]


def test_a_folder_that_gets_another_file_is_tokenised_anew(tmp_path):
    (tmp_path / "a.txt").write_text("eins")
    options = {"train": str(tmp_path), "tokenizer": tiny_tokenizer()}
    before = TextFiles(**options).fingerprint
    assert TextFiles(**options).fingerprint == before
    (tmp_path / "b.txt").write_text("zwei")
    assert TextFiles(**options).fingerprint != before


def test_evaluation_may_score_what_comes_later_alone(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("x" * 137)
    data = TextFiles(train=str(path), test=str(path), tokenizer=tiny_tokenizer(), max_tokens=50, scored_from=40)
    data.prepare_data()
    data.setup()
    assert [batch["prompt_length"] for batch in data.test_dataloader()] == [[40], [40]]
    # The last piece has 39 tokens.
    assert data.report["test"] == {"kept": 2, "too_short": 1}
    assert data.report["train"] == {"kept": 3}
    assert sum(size.answer for batch in data.train_dataloader() for size in batch["sizes"]) == 136


def test_labels_are_all_tokens_but_the_first(tmp_path):
    (tmp_path / "a.txt").write_text("eins")
    (example,) = pieces(path=str(tmp_path / "a.txt"))
    batch = collate_training([example], 0)
    assert batch["labels"][0, 1:].tolist() == example["input_ids"][1:]
    assert batch["labels"][0, 0] == -100
    assert batch["sizes"] == [(4, 3, 0, 4)]
    assert batch["contexts"] == [(0, 4)]


BAD = {
    "empty": ('{"text": "a"}\n{"text": " "}', "x.jsonl, line 2", "text: is empty"),
    "missing": ('{"texts": "a"}', "x.jsonl, line 1", "text: is missing"),
    "null": ('{"text": null}', "x.jsonl, line 1", "text: is null"),
    "no object": ("3", "x.jsonl, line 1", "text: is int"),
    "half": ('{"text": "\\ud800"}', "x.jsonl, line 1", "holds half a character"),
    "empty file": ("", "x.txt", "text: is empty"),
    "latin": (b"Bern\nZ\xfcrich", "x.txt, line 2", "byte 7 of the file is not UTF-8"),
}


@pytest.mark.parametrize(("content", "place", "said"), BAD.values(), ids=BAD)
def test_a_bad_text_is_refused_with_its_file_and_line(content, place, said, tmp_path):
    path = tmp_path / place.partition(",")[0]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with refused(str(tmp_path / place), reason=said):
        TextFiles(train=str(path), tokenizer=tiny_tokenizer()).prepare_data()


def test_pieces_must_have_room_to_predict_something(tmp_path):
    (tmp_path / "a.txt").write_text("eins")
    for make, least in ((tiny_tokenizer, 2), (beginning, 3)):
        with refused("max_tokens", least - 1, f"{least} or more"):
            pieces(path=str(tmp_path / "a.txt"), tokenizer=make(), max_tokens=least - 1)
    with refused("scored_from", 50, "an integer from 0 to max_tokens - 1 (49)"):
        TextFiles(train="x", max_tokens=50, scored_from=50)


def test_nothing_is_generated_where_nothing_is_asked(jsonl):
    parts = {"own": QAFiles(test=str(jsonl)), "texts": TextFiles(test=str(jsonl))}
    mixture = Mixture({**parts, "train": QAFiles(train=str(jsonl))}, {"own": 0, "texts": 0, "train": 1})
    for data in (mixture, parts["texts"], Articles(max_tokens=4096)):
        for command in ("test", "fit"):
            with refused("generate_answers", True, "false", reason="is not possible with"):
                data.check_answers(command)
        with refused("predict", reason="is not possible with"):
            data.check_answers("predict")
    parts["own"].check_answers("predict")
    mixture.evaluate_on = ["own"]
    mixture.check_answers("predict")


def test_a_perplexity_is_that_of_a_token():
    assert perplexity(math.log(7.0)) == pytest.approx(7.0)
    assert perplexity(1e4) == math.inf
    assert math.isnan(perplexity(math.nan))


def test_row_files_of_all_kinds(tmp_path):
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "a.json").write_text(json.dumps([{"text": "eins"}]))
    parquet.write_table(pyarrow.table({"text": ["zwei"], "n": [1]}), tmp_path / "b.parquet")
    assert [tiny_tokenizer().decode(each["input_ids"]) for each in pieces(path=str(tmp_path))] == ["eins", "zwei"]
