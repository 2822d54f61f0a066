"""What context filters leave of HotpotQA: supporting sentences and answers, at shares of the tokens.

Each question of the first ones of the test split comes with its own ten paragraphs, or with a context of so many tokens
as the data set fills it. Tokens are SmolLM2's. Recall is of all supporting sentences together; a question's answer
counts where it is written out in its supporting paragraphs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections import Counter
from collections.abc import Iterator
from importlib import metadata
from itertools import islice
from pathlib import Path

from lrsa_lit.data import HotpotQA
from lrsa_lit.data.filters import BM25, ContextFilter, POSPriorityChunks, RandomSentences, Truncate
from lrsa_lit.data.filters.filter_measures import MEASURES, context_measures
from lrsa_lit.data.prompts import Prompt
from lrsa_lit.data.records import Passage, QARecord
from lrsa_lit.models import Backbone
from lrsa_lit.paths import shipped
from lrsa_lit.yaml_file import read_settings

SHARES = (0.1, 0.25)
SEEDS = range(5)


def filters(kept: float) -> dict[str, list[ContextFilter]]:
    return {
        "BM25": [BM25(kept=kept)],
        "BM25, published rule": [BM25(kept=kept, rule="published")],
        "random sentences": [RandomSentences(kept=kept, seed=seed) for seed in SEEDS],
        "truncation, middle": [Truncate(kept=kept)],
        "truncation, end": [Truncate(kept=kept, cut="end")],
        "POS-priority chunks": [POSPriorityChunks(kept=kept)],
    }


def own_paragraphs(data: HotpotQA) -> Iterator[QARecord]:
    """The questions of the test split with the paragraphs of their own contexts, in the file's order."""
    contexts = {question["_id"]: question["context"] for question in data.raw}
    for record in data.records("test"):
        passages = tuple(Passage(title, "".join(text).strip()) for title, text in contexts[record.id])
        yield dataclasses.replace(record, passages=passages)


class Collect(ContextFilter):
    """Leaves all as it is, and keeps the record."""

    def __init__(self) -> None:
        self.records: list[QARecord] = []

    def shorten(self, record: QARecord, prompt: Prompt) -> list[str]:
        self.records.append(record)
        return [passage.text for passage in record.passages]


def filled(data: HotpotQA) -> Iterator[QARecord]:
    """The questions of the test split, their contexts filled up to ``max_tokens``."""
    data.filter = collect = Collect()
    for record in data.records("test"):
        data.to_example(record)
        yield from collect.records
        collect.records.clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("--max-tokens", type=int, help="fill contexts; by default each has its own ten paragraphs")
    parser.add_argument("--json", type=Path, help="write the measures to a file")
    options = parser.parse_args()
    settings = read_settings(shipped("configs/model/smollm2.yaml"))["model"]["backbone"]
    tokenizer = Backbone(**settings).tokenizer
    data = HotpotQA(tokenizer=tokenizer, max_tokens=options.max_tokens or 1024)
    records = list(islice(filled(data) if options.max_tokens else own_paragraphs(data), options.questions))
    rows = []
    for kept in SHARES:
        for name, each in filters(kept).items():
            report: Counter[str] = Counter()
            start = time.perf_counter()
            for shortens in each:
                shortens.use(tokenizer)
                for record in records:
                    report.update(shortens.filtered(record).counts())
            seconds = (time.perf_counter() - start) / report["filtered"]
            rows.append({"filter": name, "kept": kept, **context_measures(report), "seconds": seconds})
            print(json.dumps(rows[-1]), flush=True)
    packages = {name: metadata.version(name) for name in ("bm25s", "sentencex", "textblob", "transformers")}
    print(f"\n{len(records)} questions, {packages}\n")
    names = [*(name for name in MEASURES if name != "context_tokens"), "seconds"]
    print(f"| filter | kept | {' | '.join(names)} |\n|{'---|' * (len(names) + 2)}")
    for row in rows:
        print(f"| {row['filter']} | {row['kept']} | {' | '.join(f'{row[name]:.3f}' for name in names)} |")
    if options.json:
        options.json.write_text(json.dumps({"questions": len(records), "packages": packages, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
