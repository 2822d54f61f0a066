"""Trained models: the backbone, rule and weights of a fit's checkpoint or of an adapter folder."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Union

from lrsa_lit.chat_template import with_arguments
from lrsa_lit.errors import UserError
from lrsa_lit.models.backbone import Backbone
from lrsa_lit.models.checkpoint_file import Unreadable, read, reason_of
from lrsa_lit.paths import expanded

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

_KEY = "lrsa_lit"
_PREFIX = "model."
"""Prefix of the LLM's weights in LongContextQA."""
GATES = "head_gates.gates"
"""Name of the heads' gates, if a fit has trained only these."""
DIGESTS = "digests."
"""Prefix of the weights that make digests, if a fit has trained these instead of the LLM."""
_TRUST = "trust_remote_code"


class Trained(NamedTuple):
    """A trained model that is not loaded yet.

    Attributes:
        backbone: the base LLM, with the settings of trained adapters.
        rule: the LRSAConfig that it was trained with, as a dict; None if it was trained densely.
        weights: all weights, or only those of the adapters; None means the base LLM's.
        template_arguments: arguments of the chat template.
        encoder: for a sentence encoder, its settings (``max_tokens`` per pass); None for a model that answers.
    """

    backbone: Backbone
    rule: dict[str, Any] | None
    weights: dict[str, Tensor] | None
    template_arguments: dict[str, Any] = {}  # noqa: RUF012 - read only
    encoder: dict[str, Any] | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The backbone's tokenizer, with the template arguments."""
        return with_arguments(self.backbone.tokenizer, self.template_arguments)

    def build(self, *, dequantize: bool = False) -> nn.Module:
        """The model with the trained weights, in training mode; ``dequantize`` as in :meth:`Backbone.build`.

        Raises:
            UserError: the base model cannot be loaded, or the trained weights do not fit it.
        """
        if self.weights is None:
            return self.backbone.build(dequantize=dequantize)
        from lrsa_lit.models.factors import factors_in

        factors = factors_in(self.weights)
        if not factors and self.backbone.low_rank is not None and self.backbone.lora is None:
            # The model was trained with whole matrices and is factored now.
            whole = self._replace(backbone=dataclasses.replace(self.backbone, low_rank=None)).build()
            self.backbone.narrow(whole)  # type: ignore[arg-type]
            return whole
        model = self.backbone.build(dequantize=dequantize, factors=factors)
        needed = {name: tuple(weight.shape) for name, weight in trained_weights(self.backbone, model).items()}
        held = {name: tuple(weight.shape) for name, weight in self.weights.items()}
        for names, what in (
            (needed.keys() - held.keys(), "are missing"),
            (held.keys() - needed.keys(), "do not exist"),
            ({name for name in needed.keys() & held.keys() if needed[name] != held[name]}, "have another shape"),
        ):
            if names:
                where = f"{what} in {self.backbone.source}, such as {min(names)}"
                raise UserError("model", reason=f"{len(names)} of the trained weights {where}")
        model.load_state_dict(self.weights, strict=False)
        return model


def trained_weights(
    backbone: Backbone, model: nn.Module, weights: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The trained part of a state dict of the model or a module around it: gates, digests, adapters, or all weights.

    Factors computed from the source's weights count as adapters, because computing them again could give others.
    """
    weights = model.state_dict() if weights is None else weights
    if digests := {name: weight for name, weight in weights.items() if name.startswith(DIGESTS)}:
        return digests
    if GATES in weights:
        return {GATES: weights[GATES]}
    if backbone.lora is None:
        return weights
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if backbone.low_rank is not None:
        from lrsa_lit.models.factors import is_factor

        trained |= set(filter(is_factor, weights))
    return {name: weight for name, weight in weights.items() if name in trained}


def check_weights(checkpoint: Mapping[str, Any], needed: Mapping[str, Tensor], *, encodes: bool = False) -> None:
    """Refuse to resume from a checkpoint with other trained weights, or from an encoder in a task that needs answers.

    Otherwise the weights of another kind of training would be ignored silently.
    """
    about, saved = checkpoint.get(_KEY) or {}, checkpoint["state_dict"]
    if about and ("encoder" in about) != encodes:
        held, task = ("an encoder", "sentence_retrieval") if "encoder" in about else ("a model", "question_answering")
        raise UserError("ckpt_path", reason=f"it holds {held} trained by a fit with task {task}")
    shapes, wanted = ({name: tuple(weight.shape) for name, weight in weights.items()} for weights in (saved, needed))
    if shapes == wanted:
        return
    held, trained = map(_kind_of, (saved, needed))
    differing = sorted(name for name in shapes.keys() | wanted.keys() if shapes.get(name) != wanted.get(name))
    kinds = f"it holds {held}, which do not fit this configuration, which trains {trained}"
    raise UserError("ckpt_path", reason=f"{kinds}; they differ in {len(differing)} tensors, such as {differing[0]}")


def _kind_of(weights: Mapping[str, Tensor]) -> str:
    if GATES in weights:
        return "gates of heads"
    if any(name.startswith(DIGESTS) for name in weights):
        return "digests"
    return "adapters" if any("lora_" in name for name in weights) else "all weights"


def describe(
    checkpoint: dict[str, Any],
    backbone: Backbone,
    rule: dict[str, Any] | None,
    template_arguments: dict[str, Any] = {},  # noqa: B006 - read only
    spectra: dict[str, Any] | None = None,
    encoder: dict[str, Any] | None = None,
    digests: dict[str, Any] | None = None,
) -> None:
    """Add to a checkpoint what :func:`load_trained` needs besides the weights.

    Args:
        checkpoint: the checkpoint that is being written.
        backbone: the base model of the training.
        rule: the rule of the training.
        template_arguments: arguments of the chat template.
        spectra: the budget of spectra, if they are trained.
        encoder: the settings of a sentence encoder, see :class:`Trained`.
        digests: the settings of digests and their LLM, if they are trained.
    """
    settings = dataclasses.asdict(backbone)
    # Whoever loads the checkpoint decides which code may run.
    del settings[_TRUST]
    checkpoint[_KEY] = {"backbone": settings, "rule": rule, "template_arguments": template_arguments}
    for name, value in (("spectra", spectra), ("encoder", encoder), ("digests", digests)):
        if value is not None:
            checkpoint[_KEY][name] = value


def described(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The description that :func:`describe` has written; empty if there is none."""
    about = checkpoint.get(_KEY)
    return about if isinstance(about, dict) else {}


def rule_of(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """The rule in the description of a checkpoint; None if it has no rule or no description."""
    rule = described(checkpoint).get("rule")
    return rule if isinstance(rule, dict) else None


def spectra_in(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """The budget of spectra in the description of a checkpoint; None if they were not trained."""
    spectra = (checkpoint.get(_KEY) or {}).get("spectra")
    return spectra if isinstance(spectra, dict) else None


def holds_factors(path: Path) -> bool:
    """Whether some weights of a readable checkpoint are low-rank factors."""
    from lrsa_lit.models.factors import is_factor
    from lrsa_lit.models.shards import WEIGHTS, empty_weights

    names = empty_weights(path) if path.is_dir() else read(path, tensors=False).get(WEIGHTS, {})
    return any(is_factor(name.removeprefix(_PREFIX)) for name in names)


def load_trained(path: Path, dtype: Any = None, *, trust_remote_code: bool = False, encodes: bool = False) -> Trained:
    """Read a checkpoint that a fit has written. All bytes are checked, and no code in it runs.

    Spectra are pruned to their budget and become low-rank factors.

    Args:
        path: the file, or the folder of a sharded checkpoint.
        dtype: dtype to load the weights in; None means the dtype of the training.
        trust_remote_code: run the code that comes with the base model, whatever the checkpoint says.
        encodes: whether a sentence encoder is expected, or a model that answers.

    Raises:
        UserError: it is not a checkpoint, is truncated or damaged, was written by an early version without a
            description, or is not of the expected kind.
    """
    from lrsa_lit.attention import LRSAConfig

    path = expanded("model", path)
    if not path.exists():
        raise UserError("model", path, reason="does not exist")
    try:
        content = read(path)
        about = typed(dict[str, Any], content.get(_KEY), _KEY)
        rule = typed(dict[str, Any] | None, about.get("rule"), f"{_KEY}.rule")
        arguments = typed(dict[str, Any], about.get("template_arguments", {}), f"{_KEY}.template_arguments")
        encoder = typed(dict[str, Any] | None, about.get("encoder"), f"{_KEY}.encoder")
        # Only training needs these settings.
        changes = {"gradient_checkpointing": False, "compile_layers": False, _TRUST: trust_remote_code}
        settings = typed(dict[str, Any], about.get("backbone"), f"{_KEY}.backbone")
        backbone = typed(Backbone, settings | changes | ({} if dtype is None else {"dtype": dtype}), f"{_KEY}.backbone")
        weights = _weights(path, content)
        if GATES in weights:
            hint = "name the base model, and use the file of gates with the system DuoAttention"
            raise UserError("model", path, reason="holds gates of heads and no weights", hint=hint)
        if any(name.startswith(DIGESTS) for name in weights):
            hint = "name the base model; lrsa validate, test and predict read digests by --ckpt_path"
            raise UserError("model", path, reason="holds digests and no weights of a model", hint=hint)
        if (spectra := spectra_in(content)) is not None:
            backbone, weights = _folded(backbone, weights, spectra)
    except Unreadable as error:
        reason = f"is not a checkpoint written by a fit, or is truncated or damaged ({error})"
        raise UserError("model", path, reason=reason) from error
    try:
        if rule is not None:
            LRSAConfig.from_dict(rule)
    except (TypeError, ValueError) as error:
        raise UserError("model", path, reason=f"has no valid rule: {error}") from error
    if encodes and encoder is None:
        hint = "lrsa fit --task sentence_retrieval trains one"
        raise UserError("model", path, reason="is a model that answers, not a sentence encoder", hint=hint)
    if encoder is not None and not encodes:
        hint = "use it as the checkpoint of the filter CPC"
        raise UserError("model", path, reason="is a sentence encoder, which cannot answer", hint=hint)
    return Trained(backbone, rule, weights, arguments, encoder)


def _folded(
    backbone: Backbone, weights: dict[str, Tensor], spectra: dict[str, Any]
) -> tuple[Backbone, dict[str, Tensor]]:
    """Convert a model with spectra to its low-rank form; Unreadable if the weights do not fit."""
    from lrsa_lit.models.spectral_budget import SpectralBudget

    settings = {name: value for name, value in spectra.items() if name != "total_steps"}
    try:
        budget = typed(SpectralBudget, settings, f"{_KEY}.spectra")
        return dataclasses.replace(backbone, low_rank=budget.low_rank), budget.folded(weights)
    except (LookupError, RuntimeError, ValueError) as error:
        raise Unreadable(f"{_KEY}.spectra: {reason_of(error)}") from error


def _weights(path: Path, content: dict[str, Any]) -> dict[str, Tensor]:
    from torch import Tensor

    from lrsa_lit.models.shards import WEIGHTS, read_weights

    weights = read_weights(path) if path.is_dir() else content.get(WEIGHTS)
    weights = typed(dict[str, Tensor], weights, WEIGHTS)
    return {name.removeprefix(_PREFIX): weight for name, weight in weights.items()}


def typed(kind: Any, value: Any, name: str) -> Any:
    """Check a value from a file against a type and convert dicts to dataclasses; Unreadable if it does not fit."""
    origin, parts = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in (Union, types.UnionType):
        matching = [part for part in parts if _fits(part, value)]
        return typed(matching[0] if matching else parts[0], value, name)
    if not _fits(kind, value):
        raise Unreadable(f"{name} is missing" if value is None else f"{name} has the wrong type")
    if origin is dict and parts[1] is not Any:
        return {key: typed(parts[1], part, f"{name}.{key}") for key, part in value.items()}
    if origin is list:
        return [typed(parts[0], part, name) for part in value]
    if not dataclasses.is_dataclass(kind):
        return value
    hints = typing.get_type_hints(kind)
    if unknown := sorted(set(value) - set(hints)):
        raise Unreadable(f"{name}.{unknown[0]} is unknown to this version")
    given = {key: typed(hints[key], part, f"{name}.{key}") for key, part in value.items()}
    try:
        return kind(**given)  # type: ignore[operator]
    except TypeError as error:
        raise Unreadable(f"{name}: {error}") from error


def _fits(kind: Any, value: Any) -> bool:
    """Whether a value matches the outermost part of a type."""
    origin, parts = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin is Literal:
        return value in parts and isinstance(value, str)
    if dataclasses.is_dataclass(origin) or origin is dict:
        return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    if origin in (int, float):
        return isinstance(value, int if origin is int else (int, float)) and not isinstance(value, bool)
    return isinstance(value, origin)
