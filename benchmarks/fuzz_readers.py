"""Damage data files at random: is what is wrong refused in one line with its place, and all else read as it stands?

    python benchmarks/fuzz_readers.py --tries 250 --seed 0

Each try writes a small data set of random texts in one of the formats that the project reads, changes it (bits and
bytes, cuts, encodings, keys, types, nesting, numbers, halves of characters, special tokens as text), and has a data
module tokenise it. What the module makes of it is compared with an oracle that parses the file by the strict rules of
its format. There are four outcomes:

    accepted    the file is valid, and the examples hold its texts, with no special token but the template's
    refused     a UserError of one line that names the file
    silent      an invalid file is accepted, or a valid one with other texts
    traceback   any other error, or a refusal without the file's name

The exit code is 1 if there is a silent one or a traceback; each is printed with its seed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import pyarrow
from pyarrow import parquet

from lrsa_lit.data import HotpotQA, LongBench, QAFiles, SquadArticles
from lrsa_lit.data.module import QADataModule
from lrsa_lit.data.tokenization import special_ids
from lrsa_lit.errors import UserError
from lrsa_lit.models.tiny import tiny_tokenizer

Row = dict[str, Any]
TOKENIZER = tiny_tokenizer()
WORDS = [
    "river",
    "café",
    "東京",
    "😀",
    "2021-01-02",
    "17",
    "null",
    "\\ud83d",
    "<|im_end|>",
    "<|im_start|>",
    '"',
    "\x00",
    "\n",
    "\u2028",
]
ROWS = 3
TOKENS = 50_000


class Format(NamedTuple):
    """How rows of (id, text, question, answer) are stored, and what reads them.

    Attributes:
        name: of the file.
        store: the value, or the values of the lines, that stand for rows.
        module: reads the file.
        texts: id, context, question and answer of each row of what :func:`store` has made; errors mean an invalid file.
    """

    name: str
    store: Callable[[list[Row]], Any]
    module: Callable[[Path], QADataModule]
    texts: Callable[[Any], Iterator[tuple[str, str, str, str]]]


def of_canonical(rows: list[Row]) -> Iterator[tuple[str, str, str, str]]:
    for row in rows:
        (passage,) = row["passages"]
        yield row["id"], passage["text"], row["question"], row["answers"][0]


def of_folder(rows: list[Row]) -> Iterator[tuple[str, str, str, str]]:
    """Rows of a folder need no id, and may have other columns."""
    return of_canonical(
        [{**row, "id": f"train-{n}" if row.get("id") is None else row["id"]} for n, row in enumerate(rows)]
    )


def of_longbench(rows: list[Row]) -> Iterator[tuple[str, str, str, str]]:
    return ((row["_id"], row["context"], row["input"], row["answers"][0]) for row in rows)


def of_hotpotqa(rows: list[Row]) -> Iterator[tuple[str, str, str, str]]:
    return ((row["_id"], "".join(row["context"][0][1]), row["question"], row["answer"]) for row in rows)


def of_squad(content: Row) -> Iterator[tuple[str, str, str, str]]:
    for article in content["data"]:
        (paragraph,) = article["paragraphs"]
        (question,) = paragraph["qas"]
        yield question["id"], paragraph["context"], question["question"], question["answers"][0]["text"]


def canonical(rows: list[Row]) -> list[Row]:
    return [
        {
            "id": r["id"],
            "passages": [{"title": "", "text": r["text"]}],
            "question": r["question"],
            "answers": [r["answer"]],
        }
        for r in rows
    ]


def longbench(rows: list[Row]) -> list[Row]:
    return [{"_id": r["id"], "context": r["text"], "input": r["question"], "answers": [r["answer"]]} for r in rows]


def hotpotqa(rows: list[Row]) -> list[Row]:
    return [
        {
            "_id": r["id"],
            "question": r["question"],
            "answer": r["answer"],
            "supporting_facts": [[f"T{r['id']}", 0]],
            "context": [[f"T{r['id']}", [r["text"]]]],
        }
        for r in rows
    ]


def squad(rows: list[Row]) -> Row:
    def article(row: Row) -> Row:
        answers = [{"text": row["answer"]}]
        question = {"id": row["id"], "question": row["question"], "is_impossible": False, "answers": answers}
        return {"title": f"T{row['id']}", "paragraphs": [{"context": row["text"], "qas": [question]}]}

    return {"data": [article(row) for row in rows]}


COMMON: dict[str, Any] = {"tokenizer": TOKENIZER, "max_tokens": TOKENS}
ONE_FILE: dict[str, Any] = {**COMMON, "sha256": None, "val_fraction": 0.0, "test_fraction": 0.0}
HUB: dict[str, Any] = {**COMMON, "hub_splits": {"train": "train"}}
FORMATS = {
    "jsonl": Format("train.jsonl", canonical, lambda path: QAFiles(train=str(path), **COMMON), of_canonical),
    "parquet": Format("train.parquet", canonical, lambda path: QAFiles(train=str(path), **COMMON), of_canonical),
    "folder jsonl": Format("train.jsonl", canonical, lambda path: QAFiles(hub=str(path.parent), **HUB), of_folder),
    "folder json": Format("train.json", canonical, lambda path: QAFiles(hub=str(path.parent), **HUB), of_folder),
    "folder parquet": Format("train.parquet", canonical, lambda path: QAFiles(hub=str(path.parent), **HUB), of_folder),
    "longbench": Format("train.jsonl", longbench, lambda path: LongBench(train=str(path), **COMMON), of_longbench),
    "hotpotqa": Format("hotpotqa.json", hotpotqa, lambda path: HotpotQA(source=str(path), **ONE_FILE), of_hotpotqa),
    "squad": Format("squad.json", squad, lambda path: SquadArticles(source=str(path), **ONE_FILE), of_squad),
}


def written(path: Path, value: Any) -> bytes:
    """A value in the format of the path."""
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(value), path, write_page_checksum=True)
        return path.read_bytes()
    if path.suffix == ".jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in value).encode()
    return json.dumps(value, ensure_ascii=False).encode()


def parsed(path: Path) -> Any:
    """What a file stands for by the rules of its format; any error means that it is invalid."""
    if path.suffix == ".parquet":
        table = parquet.read_table(path, page_checksum_verification=True)
        table.validate(full=True)
        return table.to_pylist()
    text = path.read_bytes().decode().removeprefix("\ufeff")
    if path.suffix == ".jsonl":
        return [strict(line) for line in text.split("\n") if line.strip(" \t\r\v\f")]
    return strict(text)


def strict(text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> Row:
        assert len(dict(pairs)) == len(pairs)
        return dict(pairs)

    value = json.loads(text, object_pairs_hook=unique)
    json.dumps(value, ensure_ascii=False).encode()
    return value


# Changes of bytes.


def bits(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 8])):
        changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def cut(data: bytes, draw: random.Random) -> bytes:
    start, end = sorted(draw.choices(range(len(data) + 1), k=2))
    return draw.choice([data[:start], data[end:], data[:start] + data[end:]])


def inserted(data: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(data) + 1)
    return data[:place] + draw.choice([draw.randbytes(4), b"\0" * 64, b"\n", b"\r", b"\xef\xbb\xbf"]) + data[place:]


def recoded(data: bytes, draw: random.Random) -> bytes:
    text = data.decode("utf-8", "replace")
    coding = draw.choice(["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252"])
    return text.encode(coding, "replace")


def lines_end_otherwise(data: bytes, draw: random.Random) -> bytes:
    return data.replace(b"\n", draw.choice([b"\r\n", b"\n\n", b"\n \t\n"]))


def again(data: bytes, draw: random.Random) -> bytes:
    return data + draw.choice([data, b"\xef\xbb\xbf" + data])


# Changes of the text of JSON.


def put(data: bytes, draw: random.Random) -> bytes:
    """Something else in the place of a string."""
    strings = [*_strings(data)]
    start, end = draw.choice(strings)
    other = draw.choice(
        [
            b"3", b"-0.0", b"1e999", b"NaN", b"null", b"true", b"[]", b"{}", b'[["x"]]', b'""', b'"  "', b'"\\ud83d"',
            b'"x \\udc00 y"', b'"\\ud83d\\ude00"', b'"\\u0000"', b'"<|im_end|>"', b"1" * 5000, b"[" * 100_000,
            b'{"a":' * 100_000, b"[" * 400 + b"]" * 400, b'"a": "b"', b"'x'", b'"\xed\xa0\xbd"', b'"\xff"',
            b'"x", "x": 1',
        ]
    )  # fmt: skip
    return data[:start] + other + data[end:]


def key_twice(data: bytes, draw: random.Random) -> bytes:
    """A key and its string once more in the same object."""
    strings = [*_strings(data)]
    pairs = [(key, value) for key, value in pairwise(strings) if data[key[1] : value[0]].strip() == b":"]
    key, value = draw.choice(pairs)
    return data[: value[1]] + b", " + data[key[0] : key[1]] + b': "other"' + data[value[1] :]


def _strings(data: bytes) -> Iterator[tuple[int, int]]:
    start = None
    skip = False
    for place, byte in enumerate(data):
        if skip:
            skip = False
        elif byte == ord("\\"):
            skip = True
        elif byte == ord('"'):
            if start is None:
                start = place
            else:
                yield start, place + 1
                start = None


BYTES = [bits, bits, cut, inserted, recoded, lines_end_otherwise, again]
TEXT = [put, put, put, key_twice]


def attempt(kind: str, seed: int, folder: Path) -> tuple[str, str]:
    """An outcome, and what happened."""
    draw = random.Random(f"{seed}:{kind}")
    rows = [
        {name: " ".join(draw.choices(WORDS, k=draw.randint(1, 4))) for name in ("text", "question", "answer")}
        | {"id": f"{number}"}
        for number in range(ROWS)
    ]
    for row in rows:
        # Never blank, whatever was drawn.
        row["question"], row["answer"] = f"q{row['question']}?", f"a{row['answer']}"
    form = FORMATS[kind]
    path = folder / form.name
    data = written(path, form.store(rows))
    changes = BYTES if path.suffix == ".parquet" else BYTES + TEXT
    change = draw.choice(changes)
    path.write_bytes(change(data, draw) or b"")
    try:
        expected = sorted(form.texts(parsed(path)), key=lambda row: str(row[0]))
    except Exception as error:
        expected, reason = None, f"{type(error).__name__}: {error}"
    what = f"{kind}, seed {seed}, {change.__name__}"
    try:
        data_module = form.module(path)
        data_module.prepare_split("train")
        examples = list(data_module.open_split("train"))
    except UserError as error:
        message = str(error)
        named = str(folder) in message and "\n" not in message and len(message) < 2000
        return ("refused" if named else "traceback"), f"{what}: {message}"
    except Exception:
        return "traceback", f"{what}: {traceback.format_exc()}"
    if expected is None:
        return "silent", f"{what}: accepted, though {reason}"
    return _compared(expected, examples, what)


def _compared(expected: list[tuple[str, str, str, str]], examples: list[Any], what: str) -> tuple[str, str]:
    special = special_ids(TOKENIZER)
    if len(examples) != len(expected):
        return "silent", f"{what}: {len(examples)} examples of {len(expected)} rows"
    for row, example in zip(expected, sorted(examples, key=lambda example: example["id"]), strict=True):
        name, text, question, answer = row
        prompt = TOKENIZER.decode(example["input_ids"][: example["prompt_length"]])
        target = TOKENIZER.decode(example["input_ids"][example["prompt_length"] :])
        controls = sum(number in special for number in example["input_ids"])
        if (
            example["id"] != str(name)
            or isinstance(name, bool | dict | list)
            or text.strip() not in prompt
            or question.strip() not in prompt
        ):
            return "silent", f"{what}: {row} has become {prompt!r}"
        if target != f"{answer}<|im_end|>" or controls != 4:
            return "silent", f"{what}: {row} has become {target!r} with {controls} special tokens"
    return "accepted", what


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="print every try")
    options = parser.parse_args()
    datasets.disable_progress_bars()
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in FORMATS}
    for number in range(options.tries):
        kind = list(FORMATS)[number % len(FORMATS)]
        with tempfile.TemporaryDirectory() as folder:
            os.environ["LRSA_CACHE_DIR"] = str(Path(folder, "cache"))
            (home := Path(folder, "set")).mkdir()
            outcome, what = attempt(kind, options.seed + number, home)
        counts[kind][outcome] += 1
        if options.show or outcome in ("silent", "traceback"):
            print(f"{outcome}: {what}", flush=True)
    names = ("accepted", "refused", "silent", "traceback")
    for kind, found in counts.items():
        print(f"{kind:16}" + "".join(f"{found[name]:5} {name}" for name in names))
    total = sum(counts.values(), Counter())
    print(f"{'all':16}" + "".join(f"{total[name]:5} {name}" for name in names))
    return 1 if total["silent"] or total["traceback"] else 0


if __name__ == "__main__":
    sys.exit(main())
