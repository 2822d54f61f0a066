import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lrsa_lit.data.longbench import LongBench
from lrsa_lit.data.prompts import INSTRUCTION
from lrsa_lit.errors import UserError
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


def test_a_row_becomes_a_record(tmp_path: Path):
    data = LongBench(
        test=written(tmp_path / "x.jsonl", ROW, {name: ROW[name] for name in ("input", "context", "answers")})
    )
    first, second = data.records("test")
    assert (first.id, first.task, first.question) == ("a1", "rivers", ROW["input"])
    assert [passage.text for passage in first.passages] == [ROW["context"]]
    assert (first.answers, first.match) == (("212 kilometres", "212 km"), "any")
    assert (second.id, second.task) == ("x-2", "x")


def test_the_shipped_sample_is_of_the_format(tokenizer: PreTrainedTokenizerFast):
    data = LongBench(test="data/sample-longbench.jsonl", tokenizer=tokenizer)
    assert len(prompts(data, tokenizer)) == 4
    assert data.groups("test") == ["hotpotqa", "ferry"]
    assert data.score_of("ferry") == "f1"
    rows = [json.loads(line) for line in resolve("data/sample-longbench.jsonl").read_text().splitlines()]
    assert all(row.keys() == ROW.keys() for row in rows)


def test_several_files_are_one_split(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    other = {**ROW, "_id": "b1", "dataset": "lakes"}
    files = [written(tmp_path / "a.jsonl", ROW), written(tmp_path / "b.jsonl", other)]
    data = LongBench(test=files, tokenizer=tokenizer)
    assert data.splits() == ("test",)
    assert [record.task for record in data.records("test")] == ["rivers", "lakes"]
    changed = LongBench(test=[files[0], written(tmp_path / "c.jsonl", {**other, "input": "?"})], tokenizer=tokenizer)
    assert changed.fingerprint != data.fingerprint


def test_the_prompt_is_the_projects_own_or_a_template(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
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
def test_what_is_too_long_is_left_out_or_cut_and_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, prompt: str | None
):
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


def test_both_ends_of_a_cut_context_are_equally_long(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
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
    ("line", "message"),
    [
        ({"input": None}, "field 'input' is empty: it must be a question"),
        ({"input": 3}, "field 'input' must be a string, got int"),
        ({"context": ""}, "field 'context' is empty"),
        ({"answers": []}, "field 'answers' is empty, at least one is needed"),
        ({"answers": "212"}, "field 'answers' must be a list, got str"),
        ({"answers": [212]}, "field 'answers' must be a list of strings, got one of int"),
        ({"_id": 7}, "field '_id' must be a string, got int"),
        ({"language": "zh"}, "field 'language' is 'zh', allowed is en: the score is qa_f1, of English words"),
        ({"language": "tlh"}, "field 'language' is 'tlh', allowed is en"),
        ({"all_classes": ["x"]}, "field 'all_classes' is set, allowed is null: the score is qa_f1, not of classes"),
        (
            {"dataset": "gov_report"},
            "field 'dataset' is 'gov_report', which LongBench scores by ROUGE-L, allowed is qa_f1",
        ),
        ({"dataset": "lcc_e"}, "field 'dataset' is 'lcc_e', which LongBench scores by edit similarity"),
        ({"dataset": "my set"}, "field 'dataset' is 'my set', allowed are letters, digits, dot, - and _"),
        ({"contxt": "x"}, "unknown field 'contxt', allowed are input, context, answers, _id, dataset"),
        ("context", "field 'context' is missing"),
        ('{"input": ', "not valid JSON (Expecting value"),
        ("[1]", "a record must be an object, got list"),
    ],
    ids=str,
)
def test_a_bad_line_is_refused_with_its_place(tmp_path: Path, line: dict[str, Any] | str, message: str):
    if isinstance(line, dict):
        bad = json.dumps({**ROW, **line})
    else:
        bad = line if line[0] in "{[" else json.dumps({name: value for name, value in ROW.items() if name != line})
    path = tmp_path / "x.jsonl"
    path.write_text(f"{json.dumps(ROW)}\n\n{bad}\n")
    with pytest.raises(UserError) as error:
        list(LongBench(test=str(path)).records("test"))
    assert str(error.value).startswith(f"{path}, line 3: {message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "data.init_args: neither train, val nor test is set, allowed is at least one"),
        ({"test": "x", "prompt": "{context}"}, "data.init_args.prompt holds {input} 0 times, allowed is once or more"),
        (
            {"test": "x", "prompt": {"rivers": "{context}{context}{input}"}},
            "data.init_args.prompt.rivers holds {context} 2 times, allowed is once",
        ),
    ],
)
def test_a_bad_parameter_is_refused_at_once(parameters: dict[str, Any], message: str):
    with pytest.raises(UserError) as error:
        LongBench(**parameters)
    assert str(error.value) == message


def test_files_of_one_name_hold_different_questions(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    nameless = {name: value for name, value in ROW.items() if name not in ("_id", "dataset")}
    files = [tmp_path / folder / "x.jsonl" for folder in "ab"]
    for path in files:
        path.parent.mkdir()
        written(path, nameless, nameless)
    data = LongBench(test=[str(path) for path in files], tokenizer=tokenizer)
    assert [record.id for record in data.records("test")] == ["x-1", "x-2", "x-3", "x-4"]
    data.prepare_data("test")


def test_the_same_id_twice_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    data = LongBench(test=written(tmp_path / "x.jsonl", ROW, ROW), tokenizer=tokenizer)
    with pytest.raises(UserError, match="the id 'a1' stands twice"):
        data.prepare_data("test")
