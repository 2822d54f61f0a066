"""The rule as users write it, and what it comes to for each layer of a model."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from lrsa_lit.attention import budgets
from lrsa_lit.attention.budgets import HeadTopK
from lrsa_lit.attention.latent_stream import LatentStream
from lrsa_lit.attention.latents import LatentReader
from lrsa_lit.bounds import check_setting, is_integer, is_weight, replaced
from lrsa_lit.errors import UserError
from lrsa_lit.ops.sparse_attention import (
    Compressor,
    GroupedStream,
    HeadRules,
    Impl,
    KeyValueStream,
    LagRelative,
    Rotary,
    Rule,
    Selector,
    Stream,
    ValueWeighted,
)
from lrsa_lit.systems.system import Place, System


@dataclass(frozen=True)
class LayerRules:
    """Which rule or system each layer of a model obeys.

    Those whose index is in ``dense`` keep ordinary causal attention. A ``system`` takes the place of the rule, and
    ``budgets`` that of its K. The rotation of each layer's keys, and what reads keys and values from ``latents``, is
    known where it is needed and there is a model to read it from.
    """

    rule: Rule
    dense: tuple[int, ...] = ()
    rotaries: tuple[Rotary, ...] = ()
    system: System | None = None
    budgets: HeadTopK | None = None
    latents: tuple[LatentReader | None, ...] = ()

    def of(self, layer: int) -> Rule | HeadRules | None:
        """The rule of a layer, or the rules of its heads; None where it is dense or obeys the system."""
        if layer in self.dense or self.system is not None:
            return None
        compressor = self.rule.compressor.for_layer(layer)
        rule = self.rule.replace(compressor=compressor, rotary=self.place(layer).rotary)
        return rule if self.budgets is None else budgets.with_budget(rule, self.budgets[layer])

    def system_of(self, layer: int) -> System | None:
        """The system of a layer; None where it is dense or obeys the rule."""
        return None if layer in self.dense else self.system

    def stream(self, layer: int, impl: Impl) -> Stream:
        """What a layer holds of the past."""
        system = self.system_of(layer)
        if system is not None:
            return system.stream(self.place(layer), impl)
        rule = self.of(layer)
        if self.latents and (reader := self.latents[layer]) is not None:
            assert not isinstance(rule, HeadRules)
            return LatentStream(rule, reader, impl)
        return GroupedStream.of(rule, impl) if isinstance(rule, HeadRules) else KeyValueStream(rule, impl)

    def place(self, layer: int) -> Place:
        """The layer, as a system is told of it."""
        return Place(layer, self.rotaries[layer] if self.rotaries else None)

    def check(self, layers: int, heads: int | None = None) -> None:
        """Raise a UserError if a dense layer is none of a model's ``layers``, or budgets or the system are of others.

        Without ``heads``, the key-value heads of each layer, these are not looked at.
        """
        if unknown := [layer for layer in self.dense if layer >= layers]:
            raise UserError("dense_layers", unknown, f"a list of some of the model's layers, 0 to {layers - 1}")
        if self.budgets is not None:
            budgets.check_shape(self.budgets, layers, heads)
        if self.system is not None and heads is not None:
            self.system.check(layers, heads)


@dataclass(frozen=True)
class LRSAConfig:
    """Lag-relative sparse attention of a model (arXiv 2506.11498, arXiv 2504.04704), as YAML and config.json have it.

    Args:
        sink_size: first tokens of a sequence that are never dropped (S >= 0).
        lag_size: tokens of a lag partition (L >= 2).
        top_k: key-value pairs kept of a partition, per KV head (0 <= K <= L). K = L drops nothing, K = 0 keeps sinks
            and the raw window only.
        chunk_size: tokens between two compressions (C >= 1); null means lag_size. Every C that divides L is one and
            the same rule.
        value_weight: weight of the value score beside the key score (w >= 0), for compressors that have one. A
            compressor's own weight is taken over, so that one rule has one form.
        dense_layers: indices of the layers left to ordinary causal attention.
        compressor: what turns a partition into K pairs; the default is lag-relative selection. Also as the dict that
            its ``to_dict`` made.
        system: what takes the place of partitions in all layers that are not dense (``lrsa_lit.systems``), also as the
            dict that its ``to_dict`` made; null for the rule that the other settings say.
        head_top_k: K of each layer, or for each layer a list with K of each of its KV heads, in the place of ``top_k``,
            which null stands for in them: K = L is a dense layer or head, K = 0 one of sinks and raw window alone. Or
            the path of a JSON file with such a list. Or ``{ranking: FILE, budget: 0.25, tokens: 4096}``: of the heads
            or layers in a file of gates or of an ablation, as many of the best are dense as this share of a dense
            cache allows at the end of so many tokens, beside ``top_k`` in all others.
        latents: let caches hold the latents of kept tokens in the place of their keys and values, in the layers that
            make these from latents (``model.backbone.low_rank``). It changes what is held, not what is attended to.

    Raises:
        UserError: a value outside its bounds, in one line.
    """

    sink_size: int = 16
    lag_size: int = 128
    top_k: int = 32
    chunk_size: int | None = None
    value_weight: float = 1.0
    dense_layers: tuple[int, ...] = ()
    compressor: Compressor = field(default_factory=LagRelative)
    system: System | None = None
    # Of no narrower type: a parser would take a list with a mistake for a path.
    head_top_k: Any = None
    latents: bool = False

    def __post_init__(self) -> None:
        """Make the tuple and the compressor that JSON cannot write, then check each bound once."""
        if isinstance(self.dense_layers, Iterable) and not isinstance(self.dense_layers, str):
            object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        if not isinstance(self.compressor, Compressor):
            object.__setattr__(self, "compressor", Compressor.from_dict(self.compressor))
        if self.system is not None and not isinstance(self.system, System):
            object.__setattr__(self, "system", System.from_dict(self.system))
        check_setting("value_weight", self.value_weight, is_weight(self.value_weight), "a finite number >= 0")
        layers = self.dense_layers
        indices = isinstance(layers, tuple) and all(is_integer(layer) and layer >= 0 for layer in layers)
        different = indices and len(set(layers)) == len(layers)
        check_setting("dense_layers", layers, different, "a list of different layer indices >= 0")
        self._take_weight()
        # Making the rule checks the rest.
        assert self.rule
        if self.head_top_k is not None:
            if self.system is not None:
                raise UserError("head_top_k", reason="is not allowed beside a system, which has no K")
            object.__setattr__(self, "head_top_k", budgets.checked(self.head_top_k, self.rule, self.dense_layers))
        check_setting("latents", self.latents, isinstance(self.latents, bool), "true or false")
        if self.latents:
            self._check_latents()

    def _check_latents(self) -> None:
        """Latents are there of original tokens alone, and one reading serves all heads."""
        compressor, reason = self.compressor, ""
        if self.system is not None:
            reason = "is not allowed beside a system, which holds keys and values"
        elif self.head_top_k is not None:
            reason = "is not allowed beside head_top_k, by which heads hold differently many"
        elif not isinstance(compressor, Selector) or compressor.has_bias or compressor.takes_scores:
            reason = f"is not allowed beside {type(compressor).__name__}, which keeps more or other than tokens"
        if reason:
            raise UserError("latents", reason=reason, hint="set latents: false")

    def _take_weight(self) -> None:
        """Let the weight stand here and not in the compressor: files that name digests have always had it here."""
        # 1 and 1.0 are one rule, so they must give one digest.
        weight = float(self.value_weight)
        if isinstance(self.compressor, ValueWeighted) and self.compressor.value_weight != 1:
            own = float(self.compressor.value_weight)
            check_setting("value_weight", weight, weight in (1, own), f"{own}, as the compressor has it, or left out")
            weight = own
            object.__setattr__(self, "compressor", dataclasses.replace(self.compressor, value_weight=1.0))
        object.__setattr__(self, "value_weight", weight)

    @functools.cached_property
    def rule(self) -> Rule:
        """What the operator is told."""
        compressor = self.compressor
        if isinstance(compressor, ValueWeighted):
            compressor = dataclasses.replace(compressor, value_weight=self.value_weight)
        return Rule(self.sink_size, self.lag_size, self.top_k, self.chunk_size, compressor)

    @property
    def needs_rotary(self) -> bool:
        """Whether the rotation of keys must be known."""
        return self.compressor.needs_rotary if self.system is None else self.system.needs_rotary

    @property
    def layers(self) -> LayerRules:
        """What a model is told."""
        return LayerRules(self.rule, self.dense_layers, system=self.system, budgets=self.head_top_k)

    def replace(self, **changes: Any) -> LRSAConfig:
        """A copy with other values; unknown names raise a UserError. Another K is one for all heads."""
        return replaced(self, {"head_top_k": None} | changes if "top_k" in changes else changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON and YAML can hold; :meth:`from_dict` is the way back."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        compressor = self.compressor.to_dict()
        if isinstance(self.compressor, ValueWeighted):
            del compressor["init_args"]["value_weight"]
        values |= {"dense_layers": list(self.dense_layers), "compressor": compressor}
        # Digests that files name are older than systems, budgets and latents.
        system, of_heads = values.pop("system"), values.pop("head_top_k")
        if not self.latents:
            del values["latents"]
        if system is not None:
            values["system"] = system.to_dict()
        if of_heads is not None:
            values["head_top_k"] = [list(layer) if isinstance(layer, tuple) else layer for layer in of_heads]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LRSAConfig:
        """The config that :meth:`to_dict` wrote; a UserError names a setting or compressor that is not known."""
        if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
            raise UserError("values", values, "a dict of settings")
        return cls().replace(**values)

    def digest(self) -> str:
        """Twelve hex digits that change whenever the rule does."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:12]
