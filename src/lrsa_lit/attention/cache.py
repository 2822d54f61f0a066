"""A Hugging Face cache that holds sinks, kept pairs and the raw window only."""

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
from lrsa_lit.attention.families import attention_modules
from lrsa_lit.attention.layout import Layout
from lrsa_lit.attention.measured import Measured, total
from lrsa_lit.attention.rotation import layers_of
from lrsa_lit.attention.stock import Lease, lease
from lrsa_lit.attention.weights_digest import weights_digest
from lrsa_lit.errors import UserError
from lrsa_lit.ops.sparse_attention import Impl, Stream


class LRSACache(Cache):
    """The compressed cache of a model: ``model.generate(…, past_key_values=LRSACache.of(model))``.

    With LRSA attention enabled, any split into calls gives what the parallel pass gives. Rows may have unequal lengths;
    pads are never kept. With the model's stock attention the cache hands out what it holds as an ordinary past. A call
    must then not reach over a compression (:func:`~lrsa_lit.attention.prefill` makes such calls), and pads are refused.

    A copy (:func:`copy.deepcopy`) goes on like the original. After an exception inside the layers, which then hold
    different tokens, calls are refused until :meth:`reset`.

    Args:
        config: the rule, the same that the model was enabled with.
        num_layers: layers of the model (``model.config.num_hidden_layers``).
        layers: the layers' rules, as :meth:`of` reads them from a model; default: those that the config alone makes.

    Attributes:
        prompt_ended: whether :meth:`end_prompt` was called.

    Raises:
        UserError: the compressor needs the rotation of a model, and there is none.
    """

    def __init__(self, config: LRSAConfig, num_layers: int, layers: LayerRules | None = None) -> None:
        self.config = config
        layers = config.layers if layers is None else layers
        layers.check(num_layers)
        if config.needs_rotary and not layers.rotaries:
            field = "compressor" if config.system is None else "system"
            reason = "works on keys without their rotation, which only the model knows: use LRSACache.of(model)"
            raise UserError(field, type(getattr(config, field)).__name__, reason=reason)
        if config.latents and not layers.latents:
            raise UserError("latents", reason="are read by a model alone: use LRSACache.of(model)")
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
        """An empty cache for a causal language model, LRSA enabled or with its stock attention.

        Args:
            model: the model.
            config: the rule for a model with stock attention; default: ``model.config.lrsa``, with which it was saved.

        Raises:
            UserError: another rule than the enabled one, none for a stock model, or a model that LRSA does not support.
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
            lacks = "hands no queries to a cache" if compressor.window else "adds no bias to its logits"
            what = "scores no tokens" if compressor.takes_scores else lacks
            reason = f"needs enable(model, …); stock attention {what}"
            raise UserError("config.compressor", type(compressor).__name__, reason=reason)
        if config.system is not None:
            raise UserError("config.system", type(config.system).__name__, reason="needs enable(model, …)")
        if config.latents:
            raise UserError("config.latents", reason="need enable(model, …); stock attention is handed keys and values")
        warn_if_trained_otherwise(inner, config)
        cache = cls(config, len(attention_modules(inner)), layers)
        cache.lease = lease(inner.base_model)
        return cache

    def begin(self, layout: Layout | None, batch: int, impl: Impl = "auto") -> None:
        """Tell all layers what comes; called once per forward, before the layers.

        The layout says which columns of the call's rows are real; it is None if the model has its stock attention.

        Raises:
            UserError: an earlier call or change was cut short, the sequences are packed, or their number is another.
        """
        progress = {layer.progress for layer in self.layers}
        if self._busy == "change" or len(progress) > 1 or None in progress:
            reason = "an exception ended an earlier call inside the layers, which now hold different tokens"
            raise UserError("cache", reason=reason, hint="reset() it or make a new one")
        if layout is not None and layout.cu_seqlens is not None:
            rows = batch if layout.row_spans is None else sum(start < stop for start, stop in layout.row_spans)
            if len(layout.cu_seqlens) - 1 > rows:
                raise UserError("position_ids", reason="restart inside a row, but packed sequences cannot be cached")
        self._busy = "call"
        for layer in self.layers:
            layer.begin(layout, batch, impl)

    def end(self) -> None:
        """Check that each layer took the tokens in, or raise a UserError; called once per forward, after the layers."""
        if skipped := [index for index, layer in enumerate(self.layers) if not layer.is_done]:
            raise UserError("cache", reason=f"layers {skipped} of the model did not attend through it")
        self._busy = None

    def end_prompt(self, to_come: Sequence[int] | None = None) -> None:
        """Say that the prompt is over, once: systems with one cut make it now. To a rule it means nothing.

        Where questions follow, ``to_come`` says how many tokens each row's has, which count in the size of a system.
        """
        system, self.prompt_ended = self.config.system, True
        if system is None:
            return
        cutting = [system] if to_come is None else [system.cutting_before(tokens) for tokens in to_come]
        with self.changing():
            if system.rows_differ or any(each != cutting[0] for each in cutting):
                # Dense layers too: all must hold equally many rows a stream.
                for layer in self.layers:
                    layer.split()
            for row, streams in enumerate(self.system_streams()):
                cutting[row % len(cutting)].end_prompt(streams)

    def system_streams(self) -> list[tuple[Stream, ...]]:
        """For all rows together, or for each: the streams of the layers that obey the system, none if all are dense."""
        rules = self.config.layers
        layers = [layer for index, layer in enumerate(self.layers) if rules.system_of(index) is not None]
        return list(zip(*(layer.streams for layer in layers), strict=True))

    @property
    def graphable(self) -> bool:
        """Whether :func:`~lrsa_lit.attention.graphed_decoding` can serve it."""
        return not self.config.latents and (self.config.system is None or self.config.system.graphable)

    @property
    def nbytes(self) -> int:
        """Bytes that are held of the past in all layers and rows."""
        return sum(layer.nbytes for layer in self.layers)

    def measured(self, rows: int) -> list[Measured]:
        """What the past of each of the first rows takes in all layers, and what it would take densely."""
        # Rows that share their streams are alike.
        apart = rows if any(len(layer.streams) > 1 for layer in self.layers) else 1
        return [self._measured(row) for row in range(apart)] * (rows // apart)

    def _measured(self, row: int) -> Measured:
        found = total([layer.measured(row) for layer in self.layers])
        # Layer by layer: what one attends to is gone before the next one does.
        return found._replace(peak=found.peak + max(layer.probing_nbytes(row) for layer in self.layers))

    def __repr__(self) -> str:
        """Tokens of a row and how many a head keeps of them, a mean where rows, layers or heads differ."""
        about = f"{len(self.layers)} layers, {type(self.config.system or self.config.compressor).__name__}"
        first, rows = self.layers[0], self.layers[0].rows
        if not (first.streams and rows):
            return f"LRSACache(empty, {about})"
        seen = sum(stream.seen for stream in first.streams) / len(first.streams)
        kept = sum(self.stored_tokens()) / len(self.layers) / rows
        share = f" ({kept / seen:.0%})" if seen else ""
        shape = f"{rows} row{'' if rows == 1 else 's'}, {about}"
        return f"LRSACache({seen:,.0f} tokens seen, {kept:,.0f} kept a head{share}, {shape})"

    @property
    def is_idle(self) -> bool:
        """Whether all calls and changes ended well, as far as one can tell before the next :meth:`begin`."""
        return self._busy is None

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Run a block that changes all layers. If it is cut short, the cache is refused until it is reset."""
        before, self._busy = self._busy, "change"
        yield
        self._busy = before

    @contextlib.contextmanager
    def probing(self) -> Iterator[None]:
        """Run a block in which calls attend to the past without being taken in: afterwards all is as before.

        If it is cut short, the cache is refused until it is reset.
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
        """Forget everything, also that a call was cut short."""
        super().reset()
        self._busy, self.prompt_ended = None, False

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices`` (or those where a bool tensor is True), in that order."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        with self.changing():
            super().batch_select_indices(indices)

    def append_rows(self, other: LRSACache) -> None:
        """Go on with the rows of another cache of the same model and rule behind those that are here; none stays there.

        Nothing is copied, and rows may be of unequal lengths.
        """
        with self.changing():
            for layer, of_other in zip(self.layers, other.layers, strict=True):
                layer.append_rows(of_other)

    def replace_row(self, row: int, other: LRSACache) -> None:
        """Go on with the one row of another cache in the place of a row."""
        with self.changing():
            for layer, of_other in zip(self.layers, other.layers, strict=True):
                layer.replace_row(row, of_other)

    def drop_row(self, row: int) -> None:
        """Forget a row; nothing of the others is copied."""
        with self.changing():
            for layer in self.layers:
                layer.drop_row(row)

    def pasts(self) -> list[Past]:
        """What each layer holds, as views, which the next call changes.

        Raises:
            UserError: a system, which holds more than keys and values, or a call that was cut short.
        """
        if self.config.system is not None:
            reason = "holds more than keys and values, which can be neither saved nor shared"
            raise UserError("system", type(self.config.system).__name__, reason=reason)
        if not self.is_idle:
            raise UserError("cache", reason="an exception ended an earlier call inside the layers", hint="reset() it")
        return [layer.past for layer in self.layers]

    def restore(self, pasts: Sequence[Past], impl: Impl = "auto") -> None:
        """Go on from copies of what :meth:`pasts` gave of a cache of the same model and rule."""
        for layer, past in zip(self.layers, pasts, strict=True):
            layer.restore(past, impl)

    def save(
        self, path: str | Path, model: Any, tokens: Sequence[Sequence[int]], notes: Mapping[str, str] | None = None
    ) -> None:
        """Write all that is held to a file, which :meth:`load` reads for the same model and rule alone.

        Args:
            path: the file, in the format of safetensors.
            model: the model whose keys and values they are.
            tokens: the ids that each row has taken in.
            notes: texts to keep beside them.

        Raises:
            UserError: the cache is empty or a system's, or the tokens are not as many as were taken in.
            OSError: the disk is full, for example.
        """
        pasts = self.pasts()
        rows, seen = pasts[0].rows, pasts[0].seen
        if not rows or [len(row) for row in tokens] != [seen[row % len(seen)] for row in range(rows)]:
            reason = f"are of lengths {[len(row) for row in tokens]}; the cache has taken in {seen} of {rows} rows"
            raise UserError("tokens", reason=reason)
        header = {"model": weights_digest(model), "rule": self.config.to_dict(), "notes": dict(notes or {})}
        write(Path(path), header, tokens, pasts)

    @classmethod
    def load(cls, path: str | Path, model: Any) -> LRSACache:
        """What :meth:`save` has written, on the model's device: it goes on as the saved one would have.

        Raises:
            UserError: the file is damaged, of another version, or was made with another model or rule.
        """
        return cls.taken_from(read(Path(path)), model)

    @classmethod
    def taken_from(cls, saved: Saved, model: Any) -> LRSACache:
        """:meth:`load` of a file that is read already."""
        cache, inner = cls.of(model), base_of(model)
        if saved.header["model"] != weights_digest(inner):
            raise refused(saved.path, "was made with another model, or its weights in another dtype")
        if (rule := saved.header["rule"]) != (own := cache.config.to_dict()):
            differ = {name: rule.get(name) for name in sorted({*rule, *own}) if rule.get(name) != own.get(name)}
            raise refused(saved.path, f"was made with another rule: {differ}")
        state = enabled_state(inner)
        cache.restore(saved.pasts(inner.device), "auto" if state is None else state.impl)
        return cache

    # The name that beam search calls.
    reorder_cache = batch_select_indices

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times."""
        with self.changing():
            super().batch_repeat_interleave(repeats)

    def positions_past_pads(self, length: int, device: torch.device) -> Tensor | None:
        """(B or 1, ``length``) positions of the next columns if all are real; None if no row has seen a pad."""
        seen = [stream.seen for stream in self.layers[0].streams]
        if all(count == self.get_seq_length() for count in seen):
            return None
        return (torch.tensor(seen, device="cpu")[:, None] + torch.arange(length, device="cpu")).to(device)

    def stored_tokens(self) -> list[float]:
        """Tokens stored per head in each layer, a mean where heads differ, summed over the rows."""
        return [layer.stored_tokens() for layer in self.layers]


def compressed_cache(cache: Any, config: LRSAConfig, num_layers: int) -> LRSACache | None:
    """The cache if it is compressed, which then must have the model's rule; None if it keeps everything."""
    if not isinstance(cache, LRSACache):
        if getattr(cache, "is_compileable", False):
            raise UserError("past_key_values", reason="static caches are not allowed; use LRSACache or a dynamic cache")
        return None
    if (len(cache.layers), cache.config) != (num_layers, config):
        has, needs = f"{len(cache.layers)} layers, {cache.config}", f"{num_layers} layers, {config}"
        raise UserError("past_key_values", reason=f"the LRSACache has {has}; this model needs {needs}")
    return cache
