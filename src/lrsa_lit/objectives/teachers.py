"""Teachers, whose outputs a model is trained to reproduce: the model itself with dense attention, or another model.

Dimensions: B rows, T tokens per row, D width of the teacher.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lrsa_lit.attention import LAYOUT, LRSAConfig, base_of, dense_pass, enable, enabled_config
from lrsa_lit.errors import UserError, named
from lrsa_lit.models.backbone import decoder_layers
from lrsa_lit.models.flops import Shape
from lrsa_lit.models.head import Head, at_head
from lrsa_lit.models.identity import digest_of
from lrsa_lit.models.sources import trained_model
from lrsa_lit.models.spectrum import without_scores
from lrsa_lit.objectives.distribution import Distribution
from lrsa_lit.strategies import is_sharded, shard

if TYPE_CHECKING:
    from lrsa_lit.data.collate import TrainBatch

SELF = "self"

_log = logging.getLogger(__name__)


class TeacherPass(ABC):
    """A teacher's outputs for the tokens that the model is trained on.

    Attributes:
        layers: the output (B T, D) of each requested decoder layer, by layer index.
    """

    layers: dict[int, Tensor]

    @abstractmethod
    def rows(self, where: Tensor) -> tuple[Tensor, ...]:
        """The inputs of :meth:`distributions` at some positions (M,): tensors with M rows each."""

    @abstractmethod
    def distributions(self, own: Head, temperature: float, top_n: int | None) -> Callable[..., Distribution]:
        """A function that maps the model's V and R of these rows to the teacher's distributions there.

        Args:
            own: the output head of the trained model.
            temperature: the divisor of the logits.
            top_n: how many of the most likely tokens have separate probabilities; None means all tokens.
        """


@dataclass(frozen=True)
class ModelPass(TeacherPass):
    """The outputs of a teacher model.

    Attributes:
        hidden: (B T, D), the inputs of its output head.
        head: its output head; None if it is the trained model's.
    """

    hidden: Tensor
    head: Head | None
    layers: dict[int, Tensor]

    def rows(self, where: Tensor) -> tuple[Tensor, ...]:
        """The hidden states."""
        return (self.hidden[where],)

    def distributions(self, own: Head, temperature: float, top_n: int | None) -> Callable[..., Distribution]:
        """The distributions from the head's logits."""
        with torch.no_grad():
            head = (self.head or own).as_autocast()
        return lambda width, rows: Distribution.of(head.logits(rows)[:, :width] / temperature, top_n)


class Teacher(ABC):
    """A teacher runs over a batch without gradients, once for all objectives that share it."""

    @abstractmethod
    def run(self, model: Any, batch: TrainBatch, inputs: Mapping[str, Any], layers: Sequence[int]) -> TeacherPass:
        """Run the teacher over a batch.

        Args:
            model: the trained model, with its rule enabled.
            batch: the training batch.
            inputs: the inputs of the model's forward.
            layers: the decoder layers whose outputs are needed.
        """

    @abstractmethod
    def shape(self, of_model: Shape) -> Shape | None:
        """The teacher's shape, for counting operations, known after its first run; None if it computes nothing."""

    def check(self, tokenizer: Any) -> None:  # noqa: B027 - a model can always teach itself
        """Raise a UserError unless the teacher can teach a model with this tokenizer."""

    def open(self, data: str, vocabulary: int) -> None:  # noqa: B027 - most read nothing from the disk
        """Open the files that the teacher reads; a UserError if they are missing.

        Args:
            data: fingerprint of the training split.
            vocabulary: rows of the trained model's head.
        """


@dataclass(frozen=True)
class OwnDense(Teacher):
    """The trained model's current weights with dense attention and without dropout; they are not copied.

    Args:
        adapters: use the adapters, or the scores of spectra; if false, the teacher is the base model.
    """

    adapters: bool = True

    @torch.no_grad()
    def run(self, model: Any, batch: TrainBatch, inputs: Mapping[str, Any], layers: Sequence[int]) -> TeacherPass:
        """See :class:`Teacher`."""
        off = contextlib.nullcontext() if self.adapters else _without_additions(model)
        with off, dense_pass(model), _evaluating(model), outputs_of_layers(model, layers) as found:
            hidden = at_head(model, lambda rows, _: rows.flatten(0, 1), **inputs)
        return ModelPass(hidden, None, found)

    def shape(self, of_model: Shape) -> Shape:
        """The shape of the trained model."""
        return of_model


@dataclass(frozen=True)
class Loaded(Teacher):
    """Another model with dense attention, loaded once and frozen. If the trained model is sharded, so are its layers.

    Args:
        source: a checkpoint of a fit, a folder or a hub name.
        dtype: the dtype of its weights.
    """

    source: str
    dtype: str
    _held: list[Any] = field(default_factory=list, compare=False, repr=False)

    @torch.no_grad()
    def run(self, model: Any, batch: TrainBatch, inputs: Mapping[str, Any], layers: Sequence[int]) -> ModelPass:
        """See :class:`Teacher`."""
        teacher = self._model(model, inputs["input_ids"].device)
        if LAYOUT in inputs and enabled_config(teacher) is None:
            # Keeps packed sequences from seeing each other.
            count = teacher.config.get_text_config().num_hidden_layers
            enable(teacher, LRSAConfig(dense_layers=tuple(range(count))))
        made: list[Head] = []

        def keep(rows: Tensor, head: Head) -> Tensor:
            made.append(head)
            return rows.flatten(0, 1)

        with outputs_of_layers(teacher, layers) as found:
            hidden = at_head(teacher, keep, **inputs)
        return ModelPass(hidden, made[0], found)

    def shape(self, of_model: Shape) -> Shape:
        """The shape of the teacher model."""
        return Shape.of(self._held[0])

    def check(self, tokenizer: Any) -> None:
        """Refuse a teacher with another vocabulary, and warn if it was trained with a rule.

        Args:
            tokenizer: the trained model's tokenizer.

        Raises:
            UserError: the teacher has another vocabulary, or does not exist.
        """
        with named("teacher"):
            trained = trained_model(self.source, self.dtype)
            own, other = tokenizer.get_vocab(), trained.tokenizer.get_vocab()
        if own != other:
            reason = f"has a different vocabulary ({len(other)} tokens) from the trained model's ({len(own)})"
            raise UserError("teacher", self.source, reason=reason)
        if trained.rule is not None:
            _log.warning("teacher %s was trained with %s but runs with dense attention", self.source, trained.rule)

    def digest(self) -> str:
        """A digest of the teacher's files; a UserError if the model does not exist."""
        with named("teacher"):
            return digest_of(self.source, trained_model(self.source, self.dtype))

    def _model(self, model: Any, device: torch.device) -> Any:
        if not self._held:
            trained = trained_model(self.source, self.dtype)
            backbone = dataclasses.replace(trained.backbone, compile_layers=device.type == "cuda")
            teacher = trained._replace(backbone=backbone).build().requires_grad_(False).eval()
            if model is not None and is_sharded(model):
                shard(teacher, next(base_of(model).parameters()).device_mesh, layers_alone=True)
            self._held.append(teacher.to(device))
        return self._held[0]


@contextlib.contextmanager
def outputs_of_layers(model: Any, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Record the outputs (B T, D) of some decoder layers, by layer index, in the forward pass of a with block."""
    found: dict[int, Tensor] = {}

    def keep(number: int, output: Any) -> None:
        found[number] = (output[0] if isinstance(output, tuple) else output).flatten(0, 1)

    modules = decoder_layers(model) if layers else ()
    handles = [
        modules[number].register_forward_hook(lambda _, __, output, number=number: keep(number, output))
        for number in layers
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def check_own_teachers(teachers: Sequence[Teacher], *, beside: bool) -> None:
    """Refuse self-distillation for a model that trains with dense attention: it would equal its teacher.

    Args:
        teachers: the teachers of its objective.
        beside: whether there are adapters, or scores of spectra, that a teacher can leave out.

    Raises:
        UserError: a teacher equals the trained model.
    """
    if any(isinstance(each, OwnDense) and (each.adapters or not beside) for each in teachers):
        hint = "set train_attention, or name another teacher"
        if beside:
            hint += ", or use the base model without the trained part: adapters: false"
        reason = "a model that trains with dense attention cannot learn from itself with dense attention"
        raise UserError("objective", reason=reason, hint=hint)


@contextlib.contextmanager
def _without_additions(model: Any) -> Iterator[None]:
    """Run the model without its adapters or scores of spectra, if it has any."""
    if not hasattr(model, "disable_adapter"):
        with without_scores(model):
            yield
        return
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    with model.disable_adapter():
        # peft freezes adapters here, and a sharded model never trains weights that are frozen when first gathered.
        for weight in trained:
            weight.requires_grad_(True)
        yield


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)
