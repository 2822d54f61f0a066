"""A Hugging Face cache that holds only sinks, kept pairs and the raw window."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from lrsa_lit.attention.attached import base_of, enabled_state, given_or_stored, warn_if_trained_otherwise
from lrsa_lit.attention.cache_file import Saved, read, refused, write
from lrsa_lit.attention.cache_layer import LRSACacheLayer, Past
from lrsa_lit.attention.config import LayerRules, LRSAConfig
from lrsa_lit.attention.exact import without_autocast
from lrsa_lit.attention.families import attention_modules
from lrsa_lit.attention.layout import Layout
from lrsa_lit.attention.measured import Measured, total
from lrsa_lit.attention.rotation import layers_of
from lrsa_lit.attention.stock import Lease, lease
from lrsa_lit.attention.weights_digest import weights_digest
from lrsa_lit.errors import UserError
from lrsa_lit.ops.sparse_attention import Impl, Stream, fetch_numbers
from lrsa_lit.ops.to_device import to_device


class LRSACache(Cache):
    """The compressed cache of a model: ``model.generate(…, past_key_values=LRSACache.of(model))``.

    With LRSA attention enabled, any split into calls gives the outputs of the parallel pass. Rows may have unequal
    lengths; pads are never stored. With the model's stock attention, the cache returns its content as an ordinary past.
    Then no call may cross a compression (:func:`~lrsa_lit.attention.prefill` splits calls accordingly), and pads are
    refused.

    A copy (:func:`copy.deepcopy`) continues like the original. An exception inside the layers leaves them with
    different tokens; further calls are then refused until :meth:`reset`.

    Args:
        config: the rule with which the model was enabled.
        num_layers: layers of the model (``model.config.num_hidden_layers``).
        layers: the layers' rules, as :meth:`of` reads them from a model; by default the rules of the config alone.

    Attributes:
        prompt_ended: whether :meth:`end_prompt` was called.

    Raises:
        UserError: the compressor needs the rotation of a model, or the config needs its latents, and ``layers`` has
            none.
    """

    def __init__(self, config: LRSAConfig, num_layers: int, layers: LayerRules | None = None) -> None:
        self.config = config
        layers = config.layers if layers is None else layers
        layers.check(num_layers)
        if config.needs_rotary and not layers.rotaries:
            field = "compressor" if config.system is None else "system"
            reason = "needs the rotation of the model's keys: use LRSACache.of(model)"
            raise UserError(field, type(getattr(config, field)).__name__, reason=reason)
        if config.latents and not layers.latents:
            raise UserError("latents", reason="need the model's weights: use LRSACache.of(model)")
        self.lease: Lease | None = None
        self._busy: Literal["call", "change"] | None = None
        self.prompt_ended = False
        super().__init__(
            layers=[
                LRSACacheLayer(layers.of(layer), functools.partial(layers.stream, layer)) for layer in range(num_layers)
            ]
        )

    @classmethod
    def of(cls, model: Any, config: LRSAConfig | None = None) -> LRSACache:
        """An empty cache for a causal language model, with LRSA enabled or with its stock attention.

        Args:
            model: the model.
            config: the rule for a model with stock attention; default: ``model.config.lrsa``, saved with the model.

        Raises:
            UserError: the rule is not the enabled one, there is no rule, stock attention cannot run the rule, or LRSA
                does not support the model.
        """
        inner = base_of(model)
        state = enabled_state(inner)
        if state is not None:
            if config not in (None, state.config):
                raise UserError("config", config, f"{state.config}, the rule that the model was enabled with")
            return cls(state.config, len(state.modules), layers_of(inner, state.config))
        config = given_or_stored(config, inner)
        layers = layers_of(inner, config)
        if config.dense_layers:
            reason = "need enable(model, …); stock layers share one mask"
            raise UserError("config.dense_layers", config.dense_layers, reason=reason)
        if config.head_top_k is not None:
            raise UserError("config.head_top_k", reason="needs enable(model, …); stock layers share one mask")
        compressor = config.rule.compressor
        if compressor.window or compressor.has_bias or compressor.takes_scores:
            lacks = "passes no queries to a cache" if compressor.window else "adds no bias to its logits"
            what = "does not score tokens" if compressor.takes_scores else lacks
            reason = f"needs enable(model, …); stock attention {what}"
            raise UserError("config.compressor", type(compressor).__name__, reason=reason)
        if config.system is not None:
            raise UserError("config.system", type(config.system).__name__, reason="needs enable(model, …)")
        if config.latents:
            raise UserError("config.latents", reason="need enable(model, …); stock attention takes keys and values")
        warn_if_trained_otherwise(inner, config)
        cache = cls(config, len(attention_modules(inner)), layers)
        cache.lease = lease(inner.base_model)
        return cache

    def begin(self, layout: Layout | None, batch: int, impl: Impl = "auto") -> None:
        """Prepare all layers for a call. Called once per forward, before the layers.

        Args:
            layout: which columns of the rows are real; None if the model has its stock attention.
            batch: rows of the call.
            impl: the implementation of the operator.

        Raises:
            UserError: an exception interrupted an earlier call or change, the rows hold packed sequences, or their
                number has changed.
        """
        progress = {layer.progress for layer in self.layers}
        if self._busy == "change" or len(progress) > 1 or None in progress:
            reason = "an exception interrupted an earlier call; the layers now hold different tokens"
            raise UserError("cache", reason=reason, hint="call reset() or make a new one")
        if layout is not None and layout.cu_seqlens is not None:
            rows = batch if layout.row_spans is None else sum(start < stop for start, stop in layout.row_spans)
            if len(layout.cu_seqlens) - 1 > rows:
                raise UserError("position_ids", reason="restart inside a row, but packed sequences cannot be cached")
        self._busy = "call"
        for layer in self.layers:
            layer.begin(layout, batch, impl)

    def end(self) -> None:
        """Check that each layer stored the tokens, or raise a UserError. Called once per forward, after the layers."""
        if skipped := [index for index, layer in enumerate(self.layers) if not layer.is_done]:
            raise UserError("cache", reason=f"layers {skipped} of the model did not attend through it")
        self._busy = None

    def end_prompt(self, to_come: Sequence[int] | None = None) -> None:
        """End the prompt. Call it once: systems that select at the end of the prompt do so now. Rules ignore it.

        Args:
            to_come: for each row, the tokens of the question that follows; the size of a system includes them.
        """
        system, self.prompt_ended = self.config.system, True
        if system is None:
            return
        cutting = [system] if to_come is None else [system.cutting_before(tokens) for tokens in to_come]
        with self.changing(), without_autocast():
            if system.rows_differ or any(each != cutting[0] for each in cutting):
                # Dense layers too, because all layers must have the same number of streams.
                for layer in self.layers:
                    layer.split()
            rows = self.system_streams()
            system.end_prompts([cutting[row % len(cutting)] for row in range(len(rows))], rows)

    def system_streams(self) -> list[tuple[Stream, ...]]:
        """For all rows together, or for each row, the streams of the layers with a system; empty if all are dense."""
        rules = self.config.layers
        layers = [layer for index, layer in enumerate(self.layers) if rules.system_of(index) is not None]
        return list(zip(*(layer.streams for layer in layers), strict=True))

    @property
    def graphable(self) -> bool:
        """Whether :func:`~lrsa_lit.attention.graphed_decoding` can use a CUDA graph for this cache."""
        system = self.config.system
        if system is None:
            return not self.config.latents
        # A model rotates a token alike in all layers, and a dense layer needs its position.
        return system.graphable and not (self.config.latents or (system.rotates_by_slot and self.config.dense_layers))

    @property
    def nbytes(self) -> int:
        """Bytes held in all layers and rows."""
        return sum(layer.nbytes for layer in self.layers)

    def measured(self, rows: int) -> list[Measured]:
        """For each of the first ``rows`` rows, the cost of its past in all layers, and the cost of a dense cache."""
        fetch_numbers([stream for layer in self.layers for stream in layer.streams])
        apart = 1 if all(layer.rows_cost_alike for layer in self.layers) else rows
        return [self._measured(row) for row in range(apart)] * (rows // apart)

    def _measured(self, row: int) -> Measured:
        found = total([layer.measured(row) for layer in self.layers])
        # Layers run one after the other, so only the largest temporary memory of a layer counts.
        return found._replace(peak=found.peak + max(layer.probing_nbytes(row) for layer in self.layers))

    def __repr__(self) -> str:
        """Tokens seen by a row and kept per head; means if rows, layers or heads differ."""
        about = f"{len(self.layers)} layers, {type(self.config.system or self.config.compressor).__name__}"
        first, rows = self.layers[0], self.layers[0].rows
        if not (first.streams and rows):
            return f"LRSACache(empty, {about})"
        seen = sum(stream.seen for stream in first.streams) / len(first.streams)
        kept = sum(self.stored_tokens()) / len(self.layers) / rows
        share = f" ({kept / seen:.0%})" if seen else ""
        shape = f"{rows} row{'' if rows == 1 else 's'}, {about}"
        return f"LRSACache({seen:,.0f} tokens seen, {kept:,.0f} kept per head{share}, {shape})"

    @property
    def is_idle(self) -> bool:
        """Whether all calls and changes have ended without an exception, as far as known before :meth:`begin`."""
        return self._busy is None

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Run a block that changes all layers. After an exception in it, the cache is unusable until :meth:`reset`."""
        before, self._busy = self._busy, "change"
        yield
        self._busy = before

    @contextlib.contextmanager
    def probing(self) -> Iterator[None]:
        """Run a block in which calls attend to the past without being stored. Afterwards the cache is unchanged.

        If an exception interrupts the block, the cache is unusable until :meth:`reset`.
        """
        try:
            for layer in self.layers:
                layer.probing = True
            yield
        except BaseException:
            self._busy = "change"
            raise
        finally:
            for layer in self.layers:
                layer.probing = False

    def reset(self) -> None:
        """Remove all tokens. The cache is usable again if an exception had interrupted a call."""
        super().reset()
        self._busy, self.prompt_ended = None, False

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices`` (or the rows where a bool tensor is True), in that order."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        with self.changing():
            super().batch_select_indices(indices)

    def append_rows(self, other: LRSACache) -> None:
        """Move the rows of another cache of the same model and rule to the end of this one; the other becomes empty.

        Rows may have unequal lengths. Rows that already have their own streams are not copied.
        """
        with self.changing():
            for layer, of_other in zip(self.layers, other.layers, strict=True):
                layer.append_rows(of_other)

    def replace_row(self, row: int, other: LRSACache) -> None:
        """Replace a row by the only row of another cache, which becomes empty."""
        with self.changing():
            for layer, of_other in zip(self.layers, other.layers, strict=True):
                layer.replace_row(row, of_other)

    def drop_row(self, row: int) -> None:
        """Remove a row. Rows that already have their own streams are not copied."""
        with self.changing():
            for layer in self.layers:
                layer.drop_row(row)

    def pasts(self) -> list[Past]:
        """The content of each layer, as views that the next call changes.

        Raises:
            UserError: the cache belongs to a system, which holds more than keys and values; or an exception interrupted
                an earlier call.
        """
        if self.config.system is not None:
            reason = "holds more than keys and values, so its cache can be neither saved nor shared"
            raise UserError("system", type(self.config.system).__name__, reason=reason)
        if not self.is_idle:
            raise UserError("cache", reason="an exception interrupted an earlier call", hint="call reset()")
        return [layer.past for layer in self.layers]

    def restore(self, pasts: Sequence[Past], impl: Impl = "auto") -> None:
        """Continue from copies of the :meth:`pasts` of a cache of the same model and rule."""
        for layer, past in zip(self.layers, pasts, strict=True):
            layer.restore(past, impl)

    def save(
        self, path: str | Path, model: Any, tokens: Sequence[Sequence[int]], notes: Mapping[str, str] | None = None
    ) -> None:
        """Save the cache to a file, which :meth:`load` accepts only for the same model and rule.

        Args:
            path: the file, in safetensors format.
            model: the model that made the keys and values.
            tokens: the token ids that each row has seen.
            notes: texts to store in the header.

        Raises:
            UserError: the cache is empty or belongs to a system, or ``tokens`` has other lengths than the rows.
            OSError: the file cannot be written, for example because the disk is full.
        """
        pasts = self.pasts()
        rows, seen = pasts[0].rows, pasts[0].seen
        if not rows or [len(row) for row in tokens] != [seen[row % len(seen)] for row in range(rows)]:
            reason = f"have lengths {[len(row) for row in tokens]}; the cache has seen {seen} tokens in {rows} rows"
            raise UserError("tokens", reason=reason)
        header = {"model": weights_digest(model), "rule": self.config.to_dict(), "notes": dict(notes or {})}
        write(Path(path), header, tokens, pasts)

    @classmethod
    def load(cls, path: str | Path, model: Any) -> LRSACache:
        """Load a cache that :meth:`save` wrote, to the model's device. It continues like the saved one.

        Raises:
            UserError: the file is damaged, has another format version, or was made with another model or rule.
        """
        return cls.taken_from(read(Path(path)), model)

    @classmethod
    def taken_from(cls, saved: Saved, model: Any) -> LRSACache:
        """:meth:`load` for a file that has already been read."""
        cache, inner = cls.of(model), base_of(model)
        if saved.header["model"] != weights_digest(inner):
            raise refused(saved.path, "was made with another model, or its weights in another dtype")
        if (rule := saved.header["rule"]) != (own := cache.config.to_dict()):
            differ = {name: rule.get(name) for name in sorted({*rule, *own}) if rule.get(name) != own.get(name)}
            raise refused(saved.path, f"was made with another rule: {differ}")
        state = enabled_state(inner)
        cache.restore(saved.pasts(inner.device), "auto" if state is None else state.impl)
        return cache

    # The name that beam search uses.
    reorder_cache = batch_select_indices

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times."""
        with self.changing():
            super().batch_repeat_interleave(repeats)

    def positions_past_pads(self, length: int, device: torch.device) -> Tensor | None:
        """(B or 1, ``length``) positions of the next columns, all of them real; None if no row has seen a pad."""
        seen = [stream.seen for stream in self.layers[0].streams]
        if all(count == self.get_seq_length() for count in seen):
            return None
        positions = torch.tensor(seen, device="cpu")[:, None] + torch.arange(length, device="cpu")
        return to_device(positions, device)

    def stored_tokens(self) -> list[float]:
        """For each layer, tokens stored per head, summed over the rows; the mean if heads differ."""
        return [layer.stored_tokens() for layer in self.layers]


def compressed_cache(cache: Any, config: LRSAConfig, num_layers: int) -> LRSACache | None:
    """The cache if it is an LRSACache, else None.

    Raises:
        UserError: it is a static cache, or an LRSACache with another rule or number of layers than the model.
    """
    if not isinstance(cache, LRSACache):
        if getattr(cache, "is_compileable", False):
            raise UserError("past_key_values", reason="static caches are not allowed; use LRSACache or a dynamic cache")
        return None
    if (len(cache.layers), cache.config) != (num_layers, config):
        has, needs = f"{len(cache.layers)} layers, {cache.config}", f"{num_layers} layers, {config}"
        raise UserError("past_key_values", reason=f"the LRSACache has {has}; this model needs {needs}")
    return cache
