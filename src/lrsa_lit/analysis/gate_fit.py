"""Token gates, fitted to the scores that KVzip computes by repeating a context.

Dimensions: N layers, H key-value heads, T tokens of a context, P partitions of it, L lag_size, W width of the hidden
states, K top_k.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrsa_lit.attention import LRSACache, LRSAConfig, base_of, cache_argument, using
from lrsa_lit.attention.decoding.end_of_prompt import repeat_prompt
from lrsa_lit.attention.families import attention_modules
from lrsa_lit.attention.module_calls import hidden_states
from lrsa_lit.attention.scored_tokens import gate_scores
from lrsa_lit.bounds import check_setting
from lrsa_lit.errors import UserError
from lrsa_lit.ops.sparse_attention import LagRelative, Rule, compressed_at, select
from lrsa_lit.systems import KVzip
from lrsa_lit.systems.one_shot import highest
from lrsa_lit.systems.system import Encode

RIDGE = 1e-3
"""Ridge term on the diagonal of the normal equations, as a share of its mean; limits weights of rare directions."""
LEAST = 1e-6
"""Lower bound of scores: tokens that the repetition never attends to need not be distinguished."""


@dataclass(frozen=True)
class FittedGates:
    """The result of a fit of gates.

    Attributes:
        gates: (N, H, W) float32, on the CPU, for :class:`~lrsa_lit.ops.sparse_attention.TokenGate`.
        fitted_on: number of contexts that the gates were fitted on.
        held_out: number of held-out contexts, on which the shares below were measured.
        found: of the tokens of a partition that KVzip's scores keep, the share that the gates also keep.
        lag_relative: the same for the lag-relative score.
        chance: the same for random tokens, K / L.
    """

    gates: Tensor
    fitted_on: int
    held_out: int
    found: float
    lag_relative: float
    chance: float


def fit_token_gates(
    model: Any,
    contexts: Sequence[Sequence[int]],
    rule: Rule,
    *,
    encode: Encode,
    track: Callable[[Sequence[Sequence[int]]], Iterable[Sequence[int]]] = iter,
) -> FittedGates:
    """Fit a linear gate for each head of a model; the model's weights do not change.

    The gate of a head is the least-squares fit of the logarithm of KVzip's score by the hidden state before the
    attention. Means over the partition are subtracted from both: tokens compete only within their partition, so
    differences between partitions must not be learnt. KVzap (arXiv 2601.07891) fits the same logarithm over whole texts
    with an optimizer. Here the fit is exact, from sums over all tokens, and needs no learning rate or seed. The last
    tenth of the contexts, at least one, is held out; it is not a random tenth because neighbouring contexts may be
    about the same text.

    Args:
        model: a causal language model; LRSA may be enabled on it.
        contexts: token ids of each context; contexts too short to be compressed are skipped.
        rule: the rule that defines the partitions.
        encode: returns the token ids of a text, without special tokens.
        track: wraps the contexts to show progress.

    Raises:
        UserError: nothing is kept, fewer than two contexts are long enough, or one does not fit into the model's
            positions.
    """
    check_setting("top_k", rule.top_k, rule.top_k > 0, "at least 1, as gates select the kept tokens")
    usable = [context for context in contexts if compressed_at(len(context) - 1, rule)]
    if len(usable) < 2:
        needed = f"at least two of {rule.first_compression + 1} tokens or more, as shorter ones are not compressed"
        raise UserError("contexts", f"{len(usable)} of {len(contexts)}", needed)
    last = max(len(usable) // 10, 1)
    fitted_on, held_out = usable[:-last], usable[-last:]
    config = LRSAConfig(system=KVzip(pairs=max(rule.sink_size, 1), sink_size=rule.sink_size))
    training, sums, shares = model.training, _Sums(), []
    model.eval()
    try:
        with using(model, config):
            for context in track(fitted_on):
                sums.add(_judge(model, context, encode), rule)
            gates = sums.solve()
            for context in held_out:
                judged = _judge(model, context, encode)
                shares += [_shares(layer, gate, rule) for layer, gate in zip(judged, gates, strict=True)]
    finally:
        model.train(training)
    found, lag_relative = torch.tensor(shares, dtype=torch.float64).mean(dim=0).tolist()
    chance = rule.top_k / rule.lag_size
    return FittedGates(gates.float().cpu(), len(fitted_on), len(held_out), found, lag_relative, chance)


class _Judged(NamedTuple):
    """One layer's data for a context: hidden states (T, W), KVzip's scores (H, T), keys and values (1, H, T, D)."""

    hidden: Tensor
    scores: Tensor
    key: Tensor
    value: Tensor


@torch.no_grad()
def _judge(model: Any, context: Sequence[int], encode: Encode) -> list[_Judged]:
    """The data of each layer: the model reads the context, then repeats it with the cache."""
    ids, cache = torch.tensor([context], device=base_of(model).device), LRSACache.of(model)
    with _hidden_of_layers(model) as hidden:
        model(input_ids=ids, use_cache=True, logits_to_keep=1, **cache_argument(model, cache))
    repeat_prompt(model, cache, ids, encode=encode)
    (streams,) = cache.system_streams()
    pairs = [stream.stored for stream in streams]
    scores: list[Any] = [getattr(stream, "scores") for stream in streams]  # noqa: B009 - of KVzip's streams
    return [
        _Judged(states[0], of_layer[0], *pair)
        for states, of_layer, pair in zip(hidden, scores, pairs, strict=True)
        if pair is not None
    ]


@contextlib.contextmanager
def _hidden_of_layers(model: Any) -> Iterator[list[Tensor]]:
    """Collect the inputs (B, T, W) of each layer's attention in the block's only model call."""
    found: list[Tensor] = []

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(hidden_states(args, kwargs).detach())

    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in attention_modules(base_of(model))]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class _Sums:
    """Normal equations of each layer's gates: sums of states times states (W, W) and states times targets (W, H)."""

    def __init__(self) -> None:
        self.of_layers: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def add(self, judged: Sequence[_Judged], rule: Rule) -> None:
        """Add the sums over all complete partitions of a context."""
        added = []
        for layer in judged:
            states, targets = _centred(layer.hidden, rule), _centred(layer.scores.T.clamp(min=LEAST).log(), rule)
            with torch.autocast(states.device.type, enabled=False):
                added.append(((states.T @ states).double(), (states.T @ targets.to(states)).double()))
        before = self.of_layers or [(torch.zeros_like(a), torch.zeros_like(b)) for a, b in added]
        self.of_layers = [(a + c, b + d) for (a, b), (c, d) in zip(before, added, strict=True)]

    def solve(self) -> Tensor:
        """The gates (N, H, W), float64."""
        gates = []
        for states, targets in self.of_layers:
            ridge = RIDGE * states.diagonal().mean().clamp(min=1e-30)
            gates.append(torch.linalg.solve(states + ridge * torch.eye(len(states)).to(states), targets))
        return torch.stack(gates).mT


def _centred(of_tokens: Tensor, rule: Rule) -> Tensor:
    """Rows (P L, C) of all complete partitions in (T, C), minus their partition's mean, in float32 or higher."""
    count = (len(of_tokens) - rule.sink_size) // rule.lag_size
    rows = of_tokens[rule.sink_size : rule.sink_size + count * rule.lag_size]
    parts = rows.to(torch.promote_types(rows.dtype, torch.float32)).unflatten(0, (count, rule.lag_size))
    centred: Tensor = (parts - parts.mean(dim=1, keepdim=True)).flatten(0, 1)
    return centred


@torch.no_grad()
def _shares(layer: _Judged, gate: Tensor, rule: Rule) -> tuple[float, float]:
    """Of the tokens that KVzip's scores keep, the shares that the gate and the lag-relative score also keep."""
    count = compressed_at(len(layer.hidden) - 1, rule)

    def kept(scores: Tensor) -> Tensor:
        parts = scores[:, rule.sink_size : rule.sink_size + count * rule.lag_size].unflatten(1, (count, rule.lag_size))
        return highest(parts, rule.top_k)  # (H, P, K)

    wanted, gated = kept(layer.scores), kept(gate_scores(layer.hidden[None], gate)[0])
    chosen = select(layer.key, layer.value, rule.replace(compressor=LagRelative())).indices[0]
    found = [(one[..., :, None] == wanted[..., None, :]).any(dim=-1).double().mean().item()
             for one in (gated, (chosen - rule.sink_size) % rule.lag_size)]  # fmt: skip
    return found[0], found[1]
