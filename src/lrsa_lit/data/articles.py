"""Plain text for perplexity: the beginnings of whole articles, with the loss on the later tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from lrsa_lit.data.module import Score, Split
from lrsa_lit.data.prompts import SEPARATOR, Example, TooLong, render_passage
from lrsa_lit.data.records import QARecord
from lrsa_lit.data.squad import SquadArticles
from lrsa_lit.data.tokenization import encode_text
from lrsa_lit.errors import UserError


class Articles(SquadArticles):
    """The first ``max_tokens`` tokens of each SQuAD article; shorter articles are left out, questions are not used.

    The prompt of an example is the text up to token ``scored_from``, and the answer is the rest.

    Args:
        scored_from: number of tokens at the start that are only context, without a loss.
        kwargs: see SquadArticles.
    """

    score: ClassVar[Score] = "loss"
    filterable: ClassVar[bool] = False
    noun: ClassVar[str] = "article"

    def __init__(self, scored_from: int = 2048, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 1 <= scored_from < self.max_tokens:
            raise UserError("scored_from", scored_from, f"an integer from 1 to max_tokens - 1 ({self.max_tokens - 1})")
        if self.turns > 1:
            raise UserError("turns", self.turns, "1, as no questions are asked")
        self.scored_from = scored_from

    def records(self, split: Split) -> list[QARecord]:
        """One record per article: that of its first question, without supporting passages."""
        return [replace(article[0], supporting_titles=()) for article in self.articles(split)]

    def to_example(self, record: QARecord) -> Example | TooLong:
        """The example of an article's text; articles that are too short are returned as :class:`TooLong`."""
        text = SEPARATOR.join(map(render_passage, record.passages))
        ids = encode_text(self.checked_tokenizer, text).ids
        if len(ids) < self.max_tokens:
            return TooLong(len(ids))
        return Example(
            id=record.id,
            input_ids=ids[: self.max_tokens],
            prompt_length=self.scored_from,
            context_span=(0, self.max_tokens),
            gold_spans=[],
            answer_spans=[],
            answers=list(record.answers),
            match=record.match,
        )
