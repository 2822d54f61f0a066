"""Digests that replace a context, trained in two stages (IC-Former, arXiv 2406.13618).

Dimensions: k digests per chunk, N chunks, h width of the LLM.
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
"""Token ids of the vectors AE (starts a repetition), FT (follows a context) and the first digest."""


class Digests(TrainedPart, nn.Module):
    """k vectors per chunk of a context, which the LLM reads instead of the context.

    The LLM is frozen. A context of n tokens is read from the LLM's input embeddings in ceil(n / chunk) chunks of equal
    size, each independently. In the stage ``repeat``, the LLM reads [digests; AE] and must repeat one chunk of a text
    or context, whose start is drawn at random in each step. Other attentions are evaluated on the same tokens without
    digests. In the stage ``answer``, [digests; FT] replaces the context in the prompt, and the loss is that of the
    answer. The vectors AE and FT are also trained, each in its stage.

    Args:
        stage: ``repeat`` first, then ``answer`` with the first stage's checkpoint as ``start_from``.
        count: digests per chunk (k).
        chunk: the most tokens in a chunk; the paper uses 512 for 128 digests.
        layers: number of cross-attention layers.
        init: initial values of the learned vectors: ``zeros`` as in the paper's code, or ``normal``.

    Raises:
        UserError: an argument is out of bounds, or there are more digests than tokens in a chunk.
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
        """Create the vectors and layers for a model.

        Args:
            backbone: the model.
            rule: the rule of the run.
            others: other arguments of the task about training and evaluation.

        Returns:
            The attention that the run evaluates.

        Raises:
            UserError: another argument asks for other training or evaluation.
        """
        generates, objective = (others.pop(name, None) for name in ("generate_answers", "objective"))
        check_alone(_FIELD, others | {"backbone.lora": backbone.lora}, "the LLM is frozen")
        check_alone(_FIELD, {"objective": not isinstance(objective, AnswerLoss | None)}, "only answers are trained")
        repeats = self.stage == "repeat"
        check_alone(_FIELD, {"generate_answers": repeats and generates}, "the stage repeat is evaluated by its loss")
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
        """The description of the LLM in a checkpoint."""
        return {BASE: base_digest(self._backbone)}

    def install(self, model: Any) -> None:
        """Freeze the LLM; digests are passed to it as inputs."""
        model.requires_grad_(False)

    def penalised(
        self, loss: Tensor, mean: Tensor, batch: TrainBatch, step: int, steps: int
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the loss without a penalty."""
        return loss, mean, {}

    def served(self, rule: LRSAConfig) -> LRSAConfig:
        """The same attention: training does not change it."""
        return rule

    def check_base(self, checkpoint: Mapping[str, Any]) -> None:
        """Refuse a checkpoint whose digests are for another LLM."""
        check_base("ckpt_path", checkpoint, self._backbone)

    def start(self, checkpoint: str | None) -> None:
        """Load the weights of a checkpoint of either stage; None keeps the current weights.

        Raises:
            UserError: it cannot be read, is for another base LLM, or holds no digests of this number and depth.
        """
        if checkpoint is None:
            return
        held, own = read_digests(checkpoint, self._backbone), self.state_dict()
        shapes, needed = ({name: tuple(each.shape) for name, each in weights.items()} for weights in (held, own))
        if shapes != needed:
            differing = min(name for name in shapes | needed if shapes.get(name) != needed.get(name))
            counts = f"count {self.count} and layers {self.depth}"
            reason = f"holds digests whose shape does not fit {counts}; they differ in {differing}"
            raise UserError("start_from", checkpoint, reason=reason)
        self.load_state_dict(held)

    def size_of(self, size: ExampleSize) -> ExampleSize:
        """The size of an example as the LLM reads it; a UserError if the example does not mark its context."""
        if size.context is None:
            reason = "has examples without a marked context, so there is nothing to digest"
            raise UserError("data", reason=reason)
        if self.stage == "repeat":
            window = min(size.context, self.chunk)
            return ExampleSize(len(self._slots(window)) + 2 + window, window + 1)
        return ExampleSize(size.tokens - size.context + len(self._slots(size.context)) + 1, size.answer)

    def longest(self, max_tokens: int) -> int:
        """The tokens that the LLM reads for a context of ``max_tokens``, without question and answer."""
        return self.size_of(ExampleSize(max_tokens, 0, context=max_tokens)).tokens

    def check_size(self, size: ExampleSize, new_tokens: int = 0) -> None:
        """Refuse an example that, with ``new_tokens``, does not fit into the LLM's positions."""
        positions = getattr(self._backbone.config, "max_position_embeddings", None)
        needed = self.size_of(size).tokens + new_tokens
        if positions is not None and needed > positions:
            of = f"an example of {size.tokens} tokens needs {needed} with digests for its context"
            raise UserError("backbone", reason=f"has {positions} positions, but {of}")

    def read(
        self, model: Any, batch: AnyBatch, seed: int = 0, step: int | None = None, *, digested: bool = True
    ) -> tuple[Any, AnyBatch]:
        """Replace contexts of a batch by digests; returns a wrapped LLM that accepts them, and the batch.

        Args:
            model: a causal language model.
            batch: a batch of the loader.
            seed: the seed of the run.
            step: the optimizer step, which determines the random windows of the stage ``repeat``; None uses the first
                tokens.
            digested: false, in the stage ``repeat``, for the same window without digests.

        Raises:
            UserError: the examples are packed, do not mark their context, have a loss on tokens of a digested context,
                or need more positions than the LLM has.
        """
        if batch["boundaries"] is not None:
            raise UserError("packing", reason="is not allowed with digests", allowed="null")
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
        """:meth:`read` for evaluation with the run's ``own`` attention, or with another, which has no digests."""
        return self.read(model, batch, digested=own) if own or self.stage == "repeat" else (model, batch)

    def usage(self, usage: Usage, batch: Batch) -> Usage:
        """Correct the measured usage of a batch: include the reader's work, and compare with the undigested prompt.

        Args:
            usage: the measured usage of the LLM.
            batch: the loader's batch, which must be the last one that :meth:`read` got.
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
        """Token ids of the digests of ``length`` tokens; ``first`` is the index of their first chunk."""
        count = self.count * len(self.system.spans(length))
        return list(range(_FIRST - first * self.count, _FIRST - first * self.count - count, -1))

    def _digestible(self, batch: TrainBatch, number: int, seed: int, step: int | None) -> Span:
        """Columns [start, end) to digest in a row: its context, or, in the stage ``repeat``, one chunk of it."""
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
        # Without any context, use one chunk of a single token, because DDP needs a gradient for every weight.
        tokens, lengths = chunks_of(ids, chunks or [(0, 0, 1)])
        embeddings = model.get_input_embeddings()(tokens)
        digests = self.reader(embeddings, lengths)[: len(chunks)]
        return torch.cat([self.ae[None], self.ft[None], digests.flatten(0, 1).to(self.ae.dtype)])


def _answering(digests: list[int], start: int, end: int, batch: TrainBatch, number: int) -> Row:
    """A row in which digests replace the columns [start, end)."""
    learnt, moved = batch["learnt"][number], len(digests) - (end - start)
    if learnt[0][0] < end:
        reason = "has a loss on tokens of the context, which digests replace; use the stage repeat for texts"
        raise UserError("data", reason=reason)
    prompts: Sequence[int] = batch.get("prompt_length", [0] * (number + 1))  # type: ignore[assignment]
    parts: list[range | list[int]] = [range(start), digests, range(end, batch["sizes"][number].tokens)]
    return Row(parts, [(one + moved, other + moved) for one, other in learnt], prompts[number] + moved)
