"""What the tests of data modules share."""

from collections.abc import Iterable
from typing import Any

from hypothesis import strategies as st

from lrsa_lit.data.module import QADataModule, Split
from lrsa_lit.data.prompts import Example, encode
from lrsa_lit.data.records import Passage, QARecord
from lrsa_lit.models.tiny import tiny_tokenizer

LENGTHS = {"train": range(0, 100, 10), "val": range(0, 30, 10), "test": range(0, 40, 10)}
BARE = len(encode(QARecord("", (Passage("T", "y"),), "Q?", ("a",)), tiny_tokenizer(), 1024)["input_ids"])


class Words(QADataModule):
    """Records of BARE + 0, BARE + 10, ... tokens."""

    def __init__(self, word: str = "x", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.word = word
        self.asked: list[str] = []

    def records(self, split: Split) -> Iterable[QARecord]:
        for number in LENGTHS[split]:
            self.asked.append(f"{split}{number}")
            yield QARecord(f"{split}{number}", (Passage("T", "y" + self.word * number),), "Q?", ("a",), ("T",))


def built(**kwargs: Any) -> Words:
    data = Words(**kwargs)
    data.prepare_data()
    data.setup()
    return data


def ids(loader: Iterable[dict[str, Any]]) -> list[str]:
    return [name for batch in loader for name in batch["id"]]


def example(prompt: list[int], answer: list[int], name: str = "r") -> Example:
    return Example(
        id=name,
        input_ids=prompt + answer,
        prompt_length=len(prompt),
        gold_spans=[[0, 1]],
        answer_spans=[],
        answers=["a", "b"],
        match="any",
    )


def examples() -> st.SearchStrategy[Example]:
    tokens = st.lists(st.integers(0, 9), min_size=1, max_size=8)
    return st.builds(example, tokens, tokens)
