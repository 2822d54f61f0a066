from typing import Any

import data_files
import pytest
from helpers import refused
from transformers import PreTrainedTokenizerFast

from lrsa_lit.data.module import SPLITS
from lrsa_lit.data.squad import SquadArticles, article_records


@pytest.fixture
def source(tmp_path):
    return str(data_files.squad(tmp_path)["source"])


def small(source: str, tokenizer: PreTrainedTokenizerFast, **kwargs: Any) -> SquadArticles:
    return SquadArticles(source, None, val_fraction=0.3, test_fraction=0.3, tokenizer=tokenizer, **kwargs)


def test_the_context_is_the_whole_article():
    records = article_records(data_files.article("The_Fiords", 5))
    assert [record.id for record in records] == ["The_Fiords-1", "The_Fiords-2"]
    assert [passage.title for passage in records[0].passages] == [f"The Fiords ({n})" for n in (1, 2, 3)]
    assert records[0].supporting_titles == ("The Fiords (2)",)
    assert (records[0].question, records[0].answers) == ("Where is it?", ("Oslo", "in Oslo"))


def test_articles_that_do_not_fit_are_counted(source, tokenizer):
    data = small(source, tokenizer, max_tokens=512)
    data.prepare_data()
    data.setup()
    total = sum(data.report.values(), start=type(data.report["train"])())
    assert (total["articles_kept"], total["articles_too_long"]) == (6, 4)
    assert (total["kept"], total["too_long"]) == (12, 8)
    assert all(data.report[split]["shortest_too_long"] > 1000 for split in SPLITS if data.report[split]["too_long"])


def test_the_longer_question_of_an_article_may_be_left_out_alone(source, tokenizer):
    records = article_records(data_files.article("Short_0", 10))
    example = small(source, tokenizer).to_example(records[0])
    data = small(source, tokenizer, max_tokens=len(example["input_ids"]))
    data.prepare_data()
    for split in SPLITS:
        assert data.report[split]["kept"] == data.report[split]["articles_kept"]


def test_an_article_stays_in_its_split_at_every_length(source, tokenizer):
    whole, part = small(source, tokenizer, max_tokens=4096), small(source, tokenizer, max_tokens=512)
    names = {
        split: [{record.id.split("-")[0] for record in data.records(split)} for data in (whole, part)]
        for split in SPLITS
    }
    assert [len(names[split][0]) for split in SPLITS] == [4, 3, 3]
    assert len(set().union(*(names[split][0] for split in SPLITS))) == 10
    assert all(short <= full for full, short in names.values())


def test_gold_is_the_paragraph_that_was_asked_about(source, tokenizer):
    data = small(source, tokenizer)
    example = data.to_example(data.records("train")[0])
    text = [tokenizer.decode(example["input_ids"][start:end]) for start, end in example["gold_spans"]]
    assert len(text) == 1
    assert text[0].endswith("(2)\nIt is in Oslo.")


def test_the_real_articles(tokenizer):
    data = SquadArticles(tokenizer=tokenizer, max_tokens=20_000)
    records = [record for split in SPLITS for record in data.records(split)]
    counts = [sum(data.report[split][name] for split in SPLITS) for name in ("articles_kept", "articles_too_long")]
    assert sum(counts) == 35
    assert counts[0] == len({record.passages for record in records})
    assert len(records) + sum(data.report[split]["too_long"] for split in SPLITS) == 5928
    assert all(len(set(record.answers)) == len(record.answers) > 0 for record in records)
    assert all(len({passage.title for passage in record.passages}) == len(record.passages) for record in records)


def test_no_article_fits(tokenizer):
    with refused("max_tokens", 1024, reason="'train'"):
        SquadArticles(tokenizer=tokenizer).prepare_data()


def test_another_format_is_refused(tmp_path, tokenizer):
    (tmp_path / "x.json").write_text("{}")
    with refused(str(tmp_path / "x.json"), reason="data: is missing"):
        SquadArticles(str(tmp_path / "x.json"), None, tokenizer=tokenizer).prepare_data()
