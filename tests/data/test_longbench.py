import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers import refused
from transformers import PreTrainedTokenizerFast

from lrsa_lit.data.longbench import LongBench
from lrsa_lit.data.prompts import INSTRUCTION
from lrsa_lit.paths import resolve

ROW = {
    "input": "How long is the Isk?",
    "context": "The Isk is 212 kilometres long.",
    "answers": ["212 kilometres", "212 km"],
    "length": 6,
    "dataset": "rivers",
    "language": "en",
    "all_classes": None,
    "_id": "a1",
}
TEMPLATE = "Read this.\n\n{context}\n\nNow answer: {input}\nAnswer:"


def written(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    return str(path)


def prompts(data: LongBench, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    data.prepare_data("test")
    data.setup("test")
    batches = list(data.test_dataloader())
    return [tokenizer.decode(row) for batch in batches for row in batch["prompt_ids"]]


def test_a_row_becomes_a_record(tmp_path):
    data = LongBench(
        test=written(tmp_path / "x.jsonl", ROW, {name: ROW[name] for name in ("input", "context", "answers")})
    )
    first, second = data.records("test")
    assert (first.id, first.task, first.question) == ("a1", "rivers", ROW["input"])
    assert [passage.text for passage in first.passages] == [ROW["context"]]
    assert (first.answers, first.match) == (("212 kilometres", "212 km"), "any")
    assert (second.id, second.task) == ("x-2", "x")


def test_the_shipped_sample_is_of_the_format(tokenizer):
    data = LongBench(test="data/sample-longbench.jsonl", tokenizer=tokenizer)
    assert len(prompts(data, tokenizer)) == 4
    assert data.groups("test") == ["hotpotqa", "ferry"]
    assert data.score_of("ferry") == "f1"
    rows = [json.loads(line) for line in resolve("data/sample-longbench.jsonl").read_text().splitlines()]
    assert all(row.keys() == ROW.keys() for row in rows)


def test_several_files_are_one_split(tmp_path, tokenizer):
    other = {**ROW, "_id": "b1", "dataset": "lakes"}
    files = [written(tmp_path / "a.jsonl", ROW), written(tmp_path / "b.jsonl", other)]
    data = LongBench(test=files, tokenizer=tokenizer)
    assert data.splits() == ("test",)
    assert [record.task for record in data.records("test")] == ["rivers", "lakes"]
    changed = LongBench(test=[files[0], written(tmp_path / "c.jsonl", {**other, "input": "?"})], tokenizer=tokenizer)
    assert changed.fingerprint != data.fingerprint


def test_the_prompt_is_the_projects_own_or_a_template(tmp_path, tokenizer):
    file = written(tmp_path / "x.jsonl", ROW, {**ROW, "_id": "a2", "dataset": "other", "context": "{input} {x"})
    begin, end = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    own, _ = prompts(LongBench(test=file, tokenizer=tokenizer), tokenizer)
    assert own == f"{begin}{ROW['context']}\n\n{INSTRUCTION}\n\nQuestion: {ROW['input']}{end}"
    for_all = prompts(LongBench(test=file, tokenizer=tokenizer, prompt=TEMPLATE), tokenizer)
    assert for_all[0] == f"{begin}Read this.\n\n{ROW['context']}\n\nNow answer: {ROW['input']}\nAnswer:{end}"
    assert for_all[1] == f"{begin}Read this.\n\n{{input}} {{x\n\nNow answer: {ROW['input']}\nAnswer:{end}"
    for_one = prompts(LongBench(test=file, tokenizer=tokenizer, prompt={"rivers": TEMPLATE}), tokenizer)
    assert for_one[0] == for_all[0]
    assert for_one[1].startswith(f"{begin}{{input}} {{x\n\n{INSTRUCTION}")


@pytest.mark.parametrize("prompt", [None, TEMPLATE])
def test_what_is_too_long_is_left_out_or_cut_and_counted(tmp_path, tokenizer, prompt):
    context = "Begin. " + " ".join(f"é{number}" for number in range(200)) + " End."
    file = written(tmp_path / "x.jsonl", ROW, {**ROW, "_id": "long", "context": context})
    options = {"test": file, "tokenizer": tokenizer, "prompt": prompt, "max_tokens": 500}
    whole = LongBench(**options)
    assert len(prompts(whole, tokenizer)) == 1
    assert (whole.report["test"]["kept"], whole.report["test"]["too_long"]) == (1, 1)
    assert whole.report["test"]["truncated"] == 0

    cut = LongBench(**options, truncate="middle")
    short, long = prompts(cut, tokenizer)
    assert ROW["context"] in short
    assert (cut.report["test"]["kept"], cut.report["test"]["truncated"], cut.report["test"]["too_long"]) == (2, 1, 0)
    head, tail = re.search(r"(Begin\. é0 .*?)(?:[ é]|\d)*?(é?\d* ?[^B]*End\.)", long, re.DOTALL).groups()
    assert context.startswith(head[:40])
    assert context.endswith(tail[-40:])
    assert ROW["input"] in long
    (length,) = [len(row["input_ids"]) for row in cut.open_split("test") if row["id"] == "long"]
    # A character of two bytes is kept whole or not at all.
    assert 496 <= length <= 500


def test_both_ends_of_a_cut_context_are_equally_long(tmp_path, tokenizer):
    context = "a" * 1000 + "b" * 1000
    data = LongBench(
        test=written(tmp_path / "x.jsonl", {**ROW, "context": context}),
        tokenizer=tokenizer,
        max_tokens=600,
        truncate="middle",
    )
    (record,) = data.records("test")
    kept = record.passages[0].text
    assert re.fullmatch("a+b+", kept)
    assert abs(kept.count("a") - kept.count("b")) <= 1
    assert len(data.to_example(record)["input_ids"]) == 600


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"input": None}, "input: "),
        ({"input": 3}, "input: is int"),
        ({"context": ""}, "context: "),
        ({"answers": []}, "answers: "),
        ({"answers": "212"}, "answers: is str"),
        ({"answers": [212]}, "answers[0]: is int"),
        ({"_id": 7}, "_id: is int"),
        ({"language": "zh"}, "language: 'zh'"),
        ({"language": "tlh"}, "language: 'tlh'"),
        ({"all_classes": ["x"]}, "all_classes: "),
        ({"dataset": "gov_report"}, "dataset: 'gov_report' is scored by ROUGE-L"),
        ({"dataset": "lcc_e"}, "dataset: 'lcc_e' is scored by edit similarity"),
        ({"dataset": "my set"}, "dataset: 'my set'"),
        ({"contxt": "x"}, "contxt: no such field"),
        ("context", "context: is missing"),
        ('{"input": ', "not valid JSON"),
        ("[1]", "record: is list"),
    ],
    ids=str,
)
def test_a_bad_line_is_refused_with_its_place(tmp_path, line, reason):
    if isinstance(line, dict):
        bad = json.dumps({**ROW, **line})
    else:
        bad = line if line[0] in "{[" else json.dumps({name: value for name, value in ROW.items() if name != line})
    path = tmp_path / "x.jsonl"
    path.write_text(f"{json.dumps(ROW)}\n\n{bad}\n")
    with refused(f"{path}, line 3", reason=reason):
        list(LongBench(test=str(path)).records("test"))


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({}, "train, val, test"),
        ({"test": "x", "prompt": "{context}"}, "prompt"),
        ({"test": "x", "prompt": {"rivers": "{context}{context}{input}"}}, "prompt.rivers"),
    ],
)
def test_a_bad_parameter_is_refused_at_once(parameters, field):
    with refused(field):
        LongBench(**parameters)


def test_files_of_one_name_hold_different_questions(tmp_path, tokenizer):
    nameless = {name: value for name, value in ROW.items() if name not in ("_id", "dataset")}
    files = [tmp_path / folder / "x.jsonl" for folder in "ab"]
    for path in files:
        path.parent.mkdir()
        written(path, nameless, nameless)
    data = LongBench(test=[str(path) for path in files], tokenizer=tokenizer)
    assert [record.id for record in data.records("test")] == ["x-1", "x-2", "x-3", "x-4"]
    data.prepare_data("test")


def test_the_same_id_twice_is_refused(tmp_path, tokenizer):
    data = LongBench(test=written(tmp_path / "x.jsonl", ROW, ROW), tokenizer=tokenizer)
    with refused("test", data.test, reason="the id 'a1' twice"):
        data.prepare_data("test")
