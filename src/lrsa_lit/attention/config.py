"""The settings of LRSA attention (:class:`LRSAConfig`), and the rule or system of each layer of a model."""

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
    """The rule or system of each layer of a model.

    Attributes:
        rule: the rule of all layers that are not dense, unless there is a system.
        dense: indices of the layers that keep ordinary causal attention.
        rotaries: the rotation of each layer's keys; empty unless it is needed and was read from a model.
        system: the system that replaces the rule.
        budgets: K of each layer or head, instead of the rule's K.
        latents: for each layer, the reader of keys and values from latents; empty unless caches hold latents.
    """

    rule: Rule
    dense: tuple[int, ...] = ()
    rotaries: tuple[Rotary, ...] = ()
    system: System | None = None
    budgets: HeadTopK | None = None
    latents: tuple[LatentReader | None, ...] = ()

    def of(self, layer: int) -> Rule | HeadRules | None:
        """The rule of a layer, or the rules of its heads; None if the layer is dense or has a system."""
        if layer in self.dense or self.system is not None:
            return None
        compressor = self.rule.compressor.for_layer(layer)
        rule = self.rule.replace(compressor=compressor, rotary=self.place(layer).rotary)
        return rule if self.budgets is None else budgets.with_budget(rule, self.budgets[layer])

    def system_of(self, layer: int) -> System | None:
        """The system of a layer; None if the layer is dense or has a rule."""
        return None if layer in self.dense else self.system

    def stream(self, layer: int, impl: Impl) -> Stream:
        """An empty stream for a layer: it will hold the layer's part of the cache."""
        system = self.system_of(layer)
        if system is not None:
            return system.stream(self.place(layer), impl)
        rule = self.of(layer)
        if self.latents and (reader := self.latents[layer]) is not None:
            assert not isinstance(rule, HeadRules)
            return LatentStream(rule, reader, impl)
        return GroupedStream.of(rule, impl) if isinstance(rule, HeadRules) else KeyValueStream(rule, impl)

    def place(self, layer: int) -> Place:
        """The index and the rotation of a layer, for systems."""
        return Place(layer, self.rotaries[layer] if self.rotaries else None)

    def check(self, layers: int, heads: int | None = None) -> None:
        """Check that the dense layers, the budgets and the system fit a model.

        Args:
            layers: the number of the model's layers.
            heads: the key-value heads of each layer. With None, the system and the heads of budgets are not checked.

        Raises:
            UserError: they do not fit.
        """
        if unknown := [layer for layer in self.dense if layer >= layers]:
            raise UserError("dense_layers", unknown, f"a list of some of the model's layers, 0 to {layers - 1}")
        if self.budgets is not None:
            budgets.check_shape(self.budgets, layers, heads)
        if self.system is not None and heads is not None:
            self.system.check(layers, heads)


@dataclass(frozen=True)
class LRSAConfig:
    """Settings of lag-relative sparse attention (arXiv 2506.11498, arXiv 2504.04704), in YAML and in config.json.

    Args:
        sink_size: the first tokens of a sequence, which are never dropped (S >= 0).
        lag_size: tokens in a partition (L >= 2).
        top_k: key-value pairs to keep per partition and KV head (0 <= K <= L). K = L drops nothing; K = 0 keeps only
            the sinks and the raw window.
        chunk_size: tokens between two compressions (C >= 1); null means lag_size. All C that divide L give the same
            result.
        value_weight: weight of the value score relative to the key score (w >= 0), for compressors that have one. A
            ``value_weight`` in the compressor is moved here.
        dense_layers: indices of the layers that keep ordinary causal attention.
        compressor: how a partition becomes K pairs; by default lag-relative selection. The dict that its ``to_dict``
            returns is also allowed.
        system: the KV-cache system that replaces partitions in all layers that are not dense (``lrsa_lit.systems``).
            The dict that its ``to_dict`` returns is also allowed. null means the rule that the other settings describe.
        head_top_k: separate K for layers or heads, instead of ``top_k``. A list with K of each layer, a list of lists
            with K of each KV head in each layer, or the path of a JSON file with one of these. In lists, null means
            ``top_k``, K = L makes a layer or head dense, and K = 0 keeps only sinks and the raw window. Or
            ``{ranking: FILE, budget: 0.25, tokens: 4096}``: the file (gates or an ablation) ranks heads or layers. As
            many of the best are dense as this share of a dense cache allows after that many tokens; the others have
            ``top_k``.
        latents: let caches hold the latents of kept tokens instead of their keys and values, in the layers that make
            keys and values from latents (``model.backbone.low_rank``). The attention stays the same.

    Raises:
        UserError: a value is outside its bounds, or settings exclude each other.
    """

    sink_size: int = 16
    lag_size: int = 128
    top_k: int = 32
    chunk_size: int | None = None
    value_weight: float = 1.0
    dense_layers: tuple[int, ...] = ()
    compressor: Compressor = field(default_factory=LagRelative)
    system: System | None = None
    # Any, because with a narrower type a parser would take a list with a mistake for a path.
    head_top_k: Any = None
    latents: bool = False

    def __post_init__(self) -> None:
        """Convert what JSON cannot express (the tuple, the compressor, the system), then check each bound once."""
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
        # The constructor of the rule checks the other values.
        assert self.rule
        if self.head_top_k is not None:
            if self.system is not None:
                raise UserError("head_top_k", reason="is not allowed with a system, which has no K")
            object.__setattr__(self, "head_top_k", budgets.checked(self.head_top_k, self.rule, self.dense_layers))
        check_setting("latents", self.latents, isinstance(self.latents, bool), "true or false")
        if self.latents:
            self._check_latents()

    def _check_latents(self) -> None:
        """Refuse settings that latents exclude: only original tokens have latents, and all heads keep equally many."""
        compressor, reason = self.compressor, ""
        if self.system is not None:
            reason = "is not allowed with a system, which holds keys and values"
        elif self.head_top_k is not None:
            reason = "is not allowed with head_top_k, with which heads may keep different numbers of tokens"
        elif not isinstance(compressor, Selector) or compressor.has_bias or compressor.takes_scores:
            reason = f"is not allowed with {type(compressor).__name__}, which does not keep plain tokens"
        if reason:
            raise UserError("latents", reason=reason, hint="set latents: false")

    def _take_weight(self) -> None:
        """Move the weight from the compressor to this config. Recorded digests expect it here."""
        # 1 and 1.0 mean the same rule and must give the same digest.
        weight = float(self.value_weight)
        if isinstance(self.compressor, ValueWeighted) and self.compressor.value_weight != 1:
            own = float(self.compressor.value_weight)
            check_setting("value_weight", weight, weight in (1, own), f"{own}, the compressor's own, or left out")
            weight = own
            object.__setattr__(self, "compressor", dataclasses.replace(self.compressor, value_weight=1.0))
        object.__setattr__(self, "value_weight", weight)

    @functools.cached_property
    def rule(self) -> Rule:
        """The rule for the operator."""
        compressor = self.compressor
        if isinstance(compressor, ValueWeighted):
            compressor = dataclasses.replace(compressor, value_weight=self.value_weight)
        return Rule(self.sink_size, self.lag_size, self.top_k, self.chunk_size, compressor)

    @property
    def needs_rotary(self) -> bool:
        """Whether the compressor or the system needs the rotation of keys."""
        return self.compressor.needs_rotary if self.system is None else self.system.needs_rotary

    @property
    def layers(self) -> LayerRules:
        """The rules of a model's layers, without rotations and readers of latents."""
        return LayerRules(self.rule, self.dense_layers, system=self.system, budgets=self.head_top_k)

    def replace(self, **changes: Any) -> LRSAConfig:
        """A copy with other values; unknown names raise a UserError. A new ``top_k`` removes ``head_top_k``."""
        return replaced(self, {"head_top_k": None} | changes if "top_k" in changes else changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON and YAML; :meth:`from_dict` reads them."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        compressor = self.compressor.to_dict()
        if isinstance(self.compressor, ValueWeighted):
            del compressor["init_args"]["value_weight"]
        values |= {"dense_layers": list(self.dense_layers), "compressor": compressor}
        # Recorded digests are older than system, head_top_k and latents: these are left out if they are not set.
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
        """The config that :meth:`to_dict` wrote; an unknown setting or compressor raises a UserError with its name."""
        if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
            raise UserError("values", values, "a dict of settings")
        return cls().replace(**values)

    def digest(self) -> str:
        """Twelve hex digits that change whenever the rule does."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:12]
