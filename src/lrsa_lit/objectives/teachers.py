"""Whose output a model is trained to have: its own under dense attention, or another model's.

Dimensions: B rows, T tokens of each, D width of the teacher.
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
    """What a teacher makes of the tokens that the model is trained on.

    Attributes:
        layers: the output (B T, D) of each decoder layer that was asked for, by its number.
    """

    layers: dict[int, Tensor]

    @abstractmethod
    def rows(self, where: Tensor) -> tuple[Tensor, ...]:
        """What :meth:`distributions` needs of some positions (M,), M rows of each."""

    @abstractmethod
    def distributions(self, own: Head, temperature: float, top_n: int | None) -> Callable[..., Distribution]:
        """A function from the model's V and R of those rows to what is taught there.

        Args:
            own: the output head of the trained model.
            temperature: that logits are divided by.
            top_n: how many of the most likely tokens stand by themselves; None: all.
        """


@dataclass(frozen=True)
class ModelPass(TeacherPass):
    """That of a model.

    Attributes:
        hidden: (B T, D), what goes into its output head.
        head: makes logits of it; None where it is the trained model's own.
    """

    hidden: Tensor
    head: Head | None
    layers: dict[int, Tensor]

    def rows(self, where: Tensor) -> tuple[Tensor, ...]:
        """The hidden states."""
        return (self.hidden[where],)

    def distributions(self, own: Head, temperature: float, top_n: int | None) -> Callable[..., Distribution]:
        """From the head's logits."""
        with torch.no_grad():
            head = (self.head or own).as_autocast()
        return lambda width, rows: Distribution.of(head.logits(rows)[:, :width] / temperature, top_n)


class Teacher(ABC):
    """A pass over a batch without gradient, once for all objectives that have the same teacher."""

    @abstractmethod
    def run(self, model: Any, batch: TrainBatch, inputs: Mapping[str, Any], layers: Sequence[int]) -> TeacherPass:
        """The pass.

        Args:
            model: the one that is trained, its rule attached.
            batch: that it is trained on.
            inputs: of the model's forward.
            layers: the decoder layers whose outputs are needed.
        """

    @abstractmethod
    def shape(self, of_model: Shape) -> Shape | None:
        """What decides its arithmetic, given that of the trained model; known once it has taught. None: it has none."""

    def check(self, tokenizer: Any) -> None:  # noqa: B027 - oneself is always fit to teach
        """Raise a UserError unless it can teach a model with a tokenizer."""

    def open(self, data: str, vocabulary: int) -> None:  # noqa: B027 - most read nothing
        """Open what it reads from the disk; a UserError if it is not there.

        Args:
            data: fingerprint of the training split.
            vocabulary: rows of the trained model's head.
        """


@dataclass(frozen=True)
class OwnDense(Teacher):
    """The trained model's current weights under dense attention: no second copy of them, and dropout off.

    Args:
        adapters: whether adapters, or scores of spectra, are on; without them it is the base model.
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
        """The model's own."""
        return of_model


@dataclass(frozen=True)
class Loaded(Teacher):
    """Another model under dense attention, loaded once, frozen; where the trained one is sharded, its layers are, too.

    Args:
        source: a fit's checkpoint, a folder or a hub name.
        dtype: of its weights.
    """

    source: str
    dtype: str
    _held: list[Any] = field(default_factory=list, compare=False, repr=False)

    @torch.no_grad()
    def run(self, model: Any, batch: TrainBatch, inputs: Mapping[str, Any], layers: Sequence[int]) -> ModelPass:
        """See :class:`Teacher`."""
        teacher = self._model(model, inputs["input_ids"].device)
        if LAYOUT in inputs and enabled_config(teacher) is None:
            # Packed sequences must not see each other.
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
        """That of the other model."""
        return Shape.of(self._held[0])

    def check(self, tokenizer: Any) -> None:
        """Refuse a teacher of another vocabulary, and warn of one that was trained under a rule.

        Args:
            tokenizer: that of the trained model.

        Raises:
            UserError: its tokens are others, or there is no such model.
        """
        with named("teacher"):
            trained = trained_model(self.source, self.dtype)
            own, other = tokenizer.get_vocab(), trained.tokenizer.get_vocab()
        if own != other:
            reason = f"has another vocabulary ({len(other)} tokens) than the trained model ({len(own)})"
            raise UserError("teacher", self.source, reason=reason)
        if trained.rule is not None:
            _log.warning("teacher %s was trained with %s and teaches with dense attention", self.source, trained.rule)

    def digest(self) -> str:
        """Names what it teaches, by the contents of its files; a UserError if there is no such model."""
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
    """The outputs (B T, D) of some decoder layers of the forward pass in a block, by number."""
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
    """Refuse that a model which trains with dense attention teaches itself what it says anyway.

    Args:
        teachers: of its objective.
        beside: whether there are adapters, or scores of spectra, that a teacher may do without.

    Raises:
        UserError: one would.
    """
    if any(isinstance(each, OwnDense) and (each.adapters or not beside) for each in teachers):
        hint = "set train_attention, or name another teacher"
        if beside:
            hint += ", or the model without what is trained: adapters: false"
        reason = "a model that trains with dense attention teaches itself nothing"
        raise UserError("objective", reason=reason, hint=hint)


@contextlib.contextmanager
def _without_additions(model: Any) -> Iterator[None]:
    """The base model alone, without adapters and scores of spectra, if there are any."""
    if not hasattr(model, "disable_adapter"):
        with without_scores(model):
            yield
        return
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    with model.disable_adapter():
        # peft freezes them meanwhile, and a sharded model never trains what it gathers frozen the first time.
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
