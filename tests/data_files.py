"""A small file, or several, for each data set that reads some: the arguments that name them, by class."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from plugin_helpers import TOWNS

from lrsa_lit.data.module import SPLITS


def records(folder: Path) -> dict[str, Any]:
    """Files of canonical records."""
    for split in SPLITS:
        lines = []
        for number in range(5):
            passages = [{"title": f"Town {n}", "text": f"It has {n * 7} wells.{' Rain fell.' * n}"} for n in range(6)]
            question = {"id": f"{split}{number}", "question": f"How many wells has Town {number}, {split}?"}
            answers = {"answers": [str(number * 7)], "supporting_titles": [f"Town {number}"]}
            lines.append(json.dumps({**question, "passages": passages, **answers}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return {split: str(folder / f"{split}.jsonl") for split in SPLITS}


def longbench(folder: Path) -> dict[str, Any]:
    """Files of LongBench's format."""
    for split in SPLITS:
        rows = [
            {"input": f"How long is the {name} of {split}?", "context": f"The {name} is 212 km.", "answers": ["212 km"]}
            for name in ("Isk", "Orda")
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return {split: [str(folder / f"{split}.jsonl")] for split in SPLITS}


def hotpotqa(folder: Path) -> dict[str, Any]:
    """Ten questions of HotpotQA's format, each with a distractor that contains its answer and one that does not."""
    questions = []
    for n in range(10):
        titles = [f"Gold {n}a", f"Gold {n}b", f"gives away {n}", f"harmless {n}"]
        texts = ["First.", f"It is Vilnius {n}.", f"Vilnius {n}!", "Nothing."]
        context = [[title, [text]] for title, text in zip(titles, texts, strict=True)]
        facts = [[titles[0], 0], [titles[1], 0]]
        question = {"_id": f"q{n}", "question": "Where?", "answer": f"Vilnius {n}"}
        questions.append({**question, "supporting_facts": facts, "context": context})
    path = folder / "hotpotqa.json"
    path.write_text(json.dumps(questions))
    return {"source": str(path), "sha256": None}


def squad(folder: Path) -> dict[str, Any]:
    """Ten articles of SQuAD's format, "Long_0" to "Long_3" of over 1,000 bytes, and one without a question."""
    articles = [article(f"Short_{n}", 10) for n in range(6)] + [article(f"Long_{n}", 1000) for n in range(4)]
    unasked = {"title": "Unasked", "paragraphs": [{"context": "x", "qas": []}]}
    path = folder / "squad.json"
    path.write_text(json.dumps({"data": [*articles, unasked]}))
    return {"source": str(path), "sha256": None}


def _articles(folder: Path) -> dict[str, Any]:
    """Ten articles that are longer than what is taken of them."""
    path = folder / "squad.json"
    path.write_text(json.dumps({"data": [article(f"Long_{n}", 2100) for n in range(10)]}))
    return {"source": str(path), "sha256": None, "scored_from": 1000}


def article(name: str, length: int) -> dict[str, Any]:
    """Three paragraphs; the second has two answerable questions and one that is not."""
    answers = [{"text": "Oslo", "answer_start": 0}, {"text": "in Oslo", "answer_start": 0}, {"text": "Oslo"}]
    asked = [
        {"id": f"{name}-1", "question": " Where is it?", "answers": answers, "is_impossible": False},
        {"id": f"{name}-2", "question": "Where is the fiord?", "answers": answers[:1], "is_impossible": False},
        {"id": f"{name}-3", "question": "Who?", "answers": [], "is_impossible": True},
    ]
    texts = ["Oslo again.", "It is in Oslo.", "x" * length]
    return {
        "title": name,
        "paragraphs": [{"context": text, "qas": asked if text == texts[1] else []} for text in texts],
    }


def _facts(folder: Path) -> dict[str, Any]:
    return {**hotpotqa(folder), **dict.fromkeys(SPLITS, 7)}


def _needles(folder: Path) -> dict[str, Any]:
    return {**hotpotqa(folder), "train": 5, "val": 5, "test": 5}


def _needles_in_turn(folder: Path) -> dict[str, Any]:
    return {**hotpotqa(folder), **dict.fromkeys(SPLITS, 7), "turns": 3}


def _nth(folder: Path) -> dict[str, Any]:
    return {**dict.fromkeys(SPLITS, 5), "of": [2, 3]}


def _ruler(folder: Path) -> dict[str, Any]:
    """The tasks whose texts are not those of other data sets."""
    from lrsa_lit.data.needle_tasks import TASKS
    from lrsa_lit.data.word_tasks import WORD_TASKS

    tasks = [*TASKS, *WORD_TASKS]
    return {**hotpotqa(folder), "tasks": tasks, **dict.fromkeys(SPLITS, len(tasks))}


def _ruler13(folder: Path) -> dict[str, Any]:
    from lrsa_lit.data.ruler_tasks import SIZED_NAMES

    (folder / "essays.json").write_text(json.dumps({"text": "It is late. Is it? The fiord, it seems, is long! " * 9}))
    tasks = {"tasks": list(SIZED_NAMES), **dict.fromkeys(SPLITS, len(SIZED_NAMES))}
    return {"source": str(folder / "essays.json"), "sha256": None, **tasks}


def _passkey(folder: Path) -> dict[str, Any]:
    return {"train": 5, "val": 5, "test": 10}


def _mixture(folder: Path) -> dict[str, Any]:
    from lrsa_lit.data import HotpotQA, QAFiles

    data_sets = {
        "own": QAFiles(**records(folder), max_tokens=2000),
        "hotpotqa": HotpotQA(**hotpotqa(folder), max_tokens=500),
    }
    return {"data_sets": data_sets, "weights": {"own": 1.0, "hotpotqa": 2.0}}


def _table(folder: Path) -> dict[str, Any]:
    (folder / "towns.csv").write_text(f"town,wells,region\n{TOWNS}")
    return {"table": str(folder / "towns.csv"), "rows": 4}


def _chats(folder: Path) -> dict[str, Any]:
    """Files of chats, one, two or three turns long."""
    for split in SPLITS:
        lines = []
        for number in range(3):
            turns = [
                message
                for turn in range(number + 1)
                for message in (
                    {"role": "user", "content": f"Say {number} in {split}, {turn}."},
                    {"role": "assistant", "content": f"{number}, {turn} times."},
                )
            ]
            lines.append(json.dumps({"messages": [{"role": "system", "content": "Be brief."}, *turns]}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return {split: str(folder / f"{split}.jsonl") for split in SPLITS}


def _instructions(folder: Path) -> dict[str, Any]:
    """Files of instructions, every other one with an input."""
    for split in SPLITS:
        rows = [{"instruction": f"Repeat {n} of {split}.", "output": f"{n}!"} for n in range(4)]
        lines = [json.dumps(row | ({"input": f"Here: {n}"} if n % 2 else {})) for n, row in enumerate(rows)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return {split: str(folder / f"{split}.jsonl") for split in SPLITS}


def _pairs(folder: Path) -> dict[str, Any]:
    """Files of pairs of rewritings."""
    for split in SPLITS:
        rows = [
            {
                "passage": f"Town {n} of {split} has {n * 7} wells. Rain fell.",
                "chosen": f"{n * 7} wells",
                "rejected": text,
            }
            for n, text in enumerate(["Rain fell.", "Rain.", "It is a town, and rain fell there."])
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return {split: str(folder / f"{split}.jsonl") for split in SPLITS}


def _texts(folder: Path) -> dict[str, Any]:
    """A text of several pieces for each split."""
    for split in SPLITS:
        (folder / f"{split}.txt").write_text(f"The {split} is late. " * 300)
    return {split: str(folder / f"{split}.txt") for split in SPLITS}


def _encoder(folder: Path) -> dict[str, Any]:
    """A checkpoint of a sentence encoder."""
    from encoders import saved

    return {"checkpoint": saved(folder / "encoder.ckpt")}


FILES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "Articles": _articles,
    "CPC": _encoder,
    "ChatFiles": _chats,
    "FactsInText": _facts,
    "HotpotQA": hotpotqa,
    "InstructionFiles": _instructions,
    "LongBench": longbench,
    "Mixture": _mixture,
    "Needles": _needles,
    "NeedlesInTurn": _needles_in_turn,
    "NthOfMany": _nth,
    "Passkey": _passkey,
    "PreferencePairs": _pairs,
    "QAFiles": records,
    "Ruler": _ruler,
    "Ruler13": _ruler13,
    "SquadArticles": squad,
    "TableCells": _table,
    "TextFiles": _texts,
}
"""They write into the folder that they are given."""
