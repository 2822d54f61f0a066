"""Digests that stand in the place of a context, trained in two stages (IC-Former, arXiv 2406.13618).

Dimensions: k digests of a chunk, N chunks, h width of the LLM.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lrsa_lit.attention import LRSAConfig, Usage
from lrsa_lit.bounds import check_integers, check_setting, is_integer
from lrsa_lit.data.collate import ExampleSize
from lrsa_lit.errors import UserError
from lrsa_lit.models.digest_reader import DigestReader
from lrsa_lit.models.digest_weights import BASE, check_base, read_digests
from lrsa_lit.models.identity import base_digest
from lrsa_lit.models.soft_tokens import SoftTokens
from lrsa_lit.objectives import AnswerLoss
from lrsa_lit.systems.icformer import ICFormer
from lrsa_lit.tasks.digested_batch import AnyBatch, Row, chunks_of, rewritten
from lrsa_lit.tasks.trained_part import TrainedPart, check_alone

if TYPE_CHECKING:
    from lrsa_lit.data.collate import Batch, TrainBatch
    from lrsa_lit.data.tokenization import Span
    from lrsa_lit.models import Backbone

_FIELD = "digests"
_AE, _FT, _FIRST = -1, -2, -3
"""Token ids of the vectors: those that begin a repetition and follow a context, and the first digest."""


class Digests(TrainedPart, nn.Module):
    """k vectors for each chunk of a context, which the LLM is given in the place of the context.

    The LLM is frozen. A context of n tokens is read in ceil(n / chunk) chunks of equal size, each for itself, from the
    LLM's input embeddings. In the stage ``repeat`` the LLM is given [digests; AE] and is to repeat the text: so much of
    a text, or of a question's context, as one chunk holds, from a place that is drawn anew in each step. Its loss under
    other attentions is that of the same tokens without digests. In the stage ``answer`` the prompt has [digests; FT] in
    the place of its context, and the answer is learnt. AE and FT are vectors that are learnt too, each in its stage.

    Args:
        stage: ``repeat`` first, then ``answer``, which ``start_from`` gives the first one's checkpoint.
        count: digests of a chunk (k).
        chunk: most tokens of a chunk; the paper has 512 for 128 digests.
        layers: of cross-attention.
        init: of the learnt vectors that digests begin as: ``zeros``, as the paper's code has it, or ``normal``.

    Raises:
        UserError: one out of bounds, or more digests than a chunk has tokens.
    """

    def __init__(
        self,
        stage: Literal["repeat", "answer"] = "answer",
        count: int = 128,
        chunk: int = 512,
        layers: int = 3,
        init: Literal["zeros", "normal"] = "zeros",
    ) -> None:
        super().__init__()
        self.stage, self.count, self.chunk, self.depth, self.init = stage, count, chunk, layers, init
        check_setting("stage", stage, stage in ("repeat", "answer"), "repeat or answer")
        check_setting("init", init, init in ("zeros", "normal"), "zeros or normal")
        check_integers(self, 1, "count", "chunk")
        check_setting("layers", layers, is_integer(layers) and layers >= 1, "an integer >= 1")
        fits = f"at most chunk, which is {chunk}: more digests than tokens compress nothing"
        check_setting("count", count, count <= chunk, fits)
        self.system = ICFormer(count, chunk)
        self._soft: SoftTokens | None = None
        self._seconds = 0.0

    def begin(self, backbone: Backbone, rule: LRSAConfig, others: dict[str, Any]) -> LRSAConfig:
        """Make the vectors and the layers for a model.

        Args:
            backbone: the model.
            rule: the run's.
            others: arguments of the task that say how else it would train or evaluate.

        Returns:
            What the run evaluates.

        Raises:
            UserError: something else is to be trained, or evaluated, as well.
        """
        generates, objective = (others.pop(name, None) for name in ("generate_answers", "objective"))
        check_alone(_FIELD, others | {"backbone.lora": backbone.lora}, "the LLM is frozen")
        check_alone(_FIELD, {"objective": not isinstance(objective, AnswerLoss | None)}, "they train on answers alone")
        repeats = self.stage == "repeat"
        check_alone(_FIELD, {"generate_answers": repeats and generates}, "what is repeated is judged by its loss")
        own = {"system": rule.system, "dense_layers": rule.dense_layers, "head_top_k": rule.head_top_k}
        own |= {"compressor": rule.compressor != LRSAConfig().compressor, "latents": rule.latents}
        check_alone(_FIELD, {f"lrsa.{name}": of for name, of in own.items()}, "the LLM attends to all digests")
        self.reader = DigestReader(backbone.config, self.count, self.depth, self.init)
        width = backbone.config.hidden_size
        self.ae = nn.Parameter(torch.zeros(width), requires_grad=repeats)
        self.ft = nn.Parameter(torch.zeros(width), requires_grad=not repeats)
        self._backbone = backbone
        return rule.replace(system=self.system)

    @property
    def described(self) -> dict[str, str]:
        """What a checkpoint says of the LLM."""
        return {BASE: base_digest(self._backbone)}

    def install(self, model: Any) -> None:
        """Freeze the LLM, which digests are handed to from outside."""
        model.requires_grad_(False)

    def penalised(
        self, loss: Tensor, mean: Tensor, batch: TrainBatch, step: int, steps: int
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Nothing is added."""
        return loss, mean, {}

    def served(self, rule: LRSAConfig) -> LRSAConfig:
        """The attention stays the same, whatever digests have become."""
        return rule

    def check_base(self, checkpoint: Mapping[str, Any]) -> None:
        """Refuse a checkpoint of digests of another LLM."""
        check_base("ckpt_path", checkpoint, self._backbone)

    def start(self, checkpoint: str | None) -> None:
        """Take the weights of a fit's checkpoint, of either stage; None keeps those that there are.

        Raises:
            UserError: it cannot be read, is of another base LLM, or holds no digests of this number and depth.
        """
        if checkpoint is None:
            return
        held, own = read_digests(checkpoint, self._backbone), self.state_dict()
        shapes, needed = ({name: tuple(each.shape) for name, each in weights.items()} for weights in (held, own))
        if shapes != needed:
            differing = min(name for name in shapes | needed if shapes.get(name) != needed.get(name))
            counts = f"count {self.count} and layers {self.depth}"
            reason = f"holds digests of another shape than {counts} make; they differ in {differing}"
            raise UserError("start_from", checkpoint, reason=reason)
        self.load_state_dict(held)

    def size_of(self, size: ExampleSize) -> ExampleSize:
        """That of an example as the LLM gets it; a UserError if it does not say which tokens are its context."""
        if size.context is None:
            reason = "has examples that do not tell their context from what is asked, so there is nothing to digest"
            raise UserError("data", reason=reason)
        if self.stage == "repeat":
            window = min(size.context, self.chunk)
            return ExampleSize(len(self._slots(window)) + 2 + window, window + 1)
        return ExampleSize(size.tokens - size.context + len(self._slots(size.context)) + 1, size.answer)

    def longest(self, max_tokens: int) -> int:
        """Tokens that the LLM gets of an example of ``max_tokens`` that is all context, its answer aside."""
        return self.size_of(ExampleSize(max_tokens, 0, context=max_tokens)).tokens

    def check_size(self, size: ExampleSize, new_tokens: int = 0) -> None:
        """Refuse an example that leaves no room for so many tokens among the LLM's positions."""
        positions = getattr(self._backbone.config, "max_position_embeddings", None)
        needed = self.size_of(size).tokens + new_tokens
        if positions is not None and needed > positions:
            of = f"an example of {size.tokens} tokens takes {needed} positions with digests for its context"
            raise UserError("backbone", reason=f"has {positions} positions, and {of}")

    def read(
        self, model: Any, batch: AnyBatch, seed: int = 0, step: int | None = None, *, digested: bool = True
    ) -> tuple[Any, AnyBatch]:
        """A batch as the LLM gets it, and the LLM as it gets that.

        Args:
            model: a causal language model.
            batch: as the loader yields it.
            seed: of the run.
            step: of the optimizer, by which windows of the stage ``repeat`` are drawn; None takes the first tokens.
            digested: false, in the stage ``repeat``, for the window alone.

        Raises:
            UserError: its examples are packed, do not tell their context, learn tokens of it where it is digested, or
                need more positions than there are.
        """
        if batch["boundaries"] is not None:
            raise UserError("packing", reason="is not allowed beside digests", allowed="null")
        began = time.perf_counter()
        rows: list[Row] = []
        chunks: list[tuple[int, int, int]] = []
        for number, size in enumerate(batch["sizes"]):
            self.check_size(size)
            start, end = self._digestible(batch, number, seed, step)
            slots = self._slots(end - start, first=len(chunks)) if digested else []
            chunks += [(number, start + one, start + other) for one, other in self.system.spans(end - start)]
            if self.stage == "repeat":
                rows.append(self._repeating([*slots, _AE] if digested else [], start, end))
            else:
                rows.append(_answering([*slots, _FT], start, end, batch, number))
        found = rewritten(batch, rows, list(map(self.size_of, batch["step_sizes"])))
        if not digested:
            return model, found
        if self._soft is None or self._soft.model is not model:
            self._soft = SoftTokens(model)
        self._soft.vectors = self._vectors(model, batch["input_ids"], chunks)
        self._seconds = time.perf_counter() - began
        return self._soft, found

    def evaluated(self, model: Any, batch: Batch, *, own: bool) -> tuple[Any, Batch]:
        """As :meth:`read`, to evaluate under the run's ``own`` attention, or under another, which has no digests."""
        return self.read(model, batch, digested=own) if own or self.stage == "repeat" else (model, batch)

    def usage(self, usage: Usage, batch: Batch) -> Usage:
        """What answering a batch has taken, as shares of the tokens that it had before, and with the digests' work.

        Args:
            usage: as it was measured, of the LLM.
            batch: as the loader yields it, the last one that was read.
        """
        rows = []
        for row, length, context in zip(usage.rows, batch["prompt_length"], batch["contexts"], strict=True):
            start, end = context if context else (0, 0)
            tokens = length - (end - start) + len(self._slots(end - start)) + 1
            layers = row.tokens // tokens
            read = self.depth * self.system.reading_pairs(end - start)
            rows.append(
                row._replace(
                    dense=row.dense // tokens * length,
                    pairs=row.pairs + read,
                    dense_pairs=layers * length * (length + 1) // 2,
                    tokens=layers * length,
                    source=layers * length,
                )
            )
        return usage._replace(rows=rows, first_token=usage.first_token + self._seconds)

    def _slots(self, length: int, first: int = 0) -> list[int]:
        """Token ids of the digests of so many tokens, whose first chunk is the ``first``."""
        count = self.count * len(self.system.spans(length))
        return list(range(_FIRST - first * self.count, _FIRST - first * self.count - count, -1))

    def _digestible(self, batch: TrainBatch, number: int, seed: int, step: int | None) -> Span:
        """Columns [start, end) of what is digested of a row: its context, or a window of it that one chunk holds."""
        start, end = batch["contexts"][number] or (0, 0)
        room = end - start - self.chunk
        if self.stage == "answer" or room <= 0:
            return start, end
        if step is not None:
            start += random.Random(f"{seed}:{step}:{batch['id'][number]}:window").randrange(room + 1)
        return start, start + self.chunk

    def _repeating(self, before: list[int], start: int, end: int) -> Row:
        first = len(before)
        last = [int(self._backbone.tokenizer.eos_token_id)]
        return Row([before, range(start, end), last], [(first, first + end - start + 1)], first)

    def _vectors(self, model: Any, ids: Tensor, chunks: list[tuple[int, int, int]]) -> Tensor:
        """(2 + N k, h): AE, FT, then the digests."""
        # Without any context one chunk of a token stands in: each weight then has a gradient, which DDP waits for.
        tokens, lengths = chunks_of(ids, chunks or [(0, 0, 1)])
        embeddings = model.get_input_embeddings()(tokens)
        digests = self.reader(embeddings, lengths)[: len(chunks)]
        return torch.cat([self.ae[None], self.ft[None], digests.flatten(0, 1).to(self.ae.dtype)])


def _answering(digests: list[int], start: int, end: int, batch: TrainBatch, number: int) -> Row:
    """A row with digests in the place of the columns [start, end)."""
    learnt, moved = batch["learnt"][number], len(digests) - (end - start)
    if learnt[0][0] < end:
        reason = "learns tokens of the context itself, which digests stand for; the stage repeat is for texts"
        raise UserError("data", reason=reason)
    prompts: Sequence[int] = batch.get("prompt_length", [0] * (number + 1))  # type: ignore[assignment]
    parts: list[range | list[int]] = [range(start), digests, range(end, batch["sizes"][number].tokens)]
    return Row(parts, [(one + moved, other + moved) for one, other in learnt], prompts[number] + moved)
