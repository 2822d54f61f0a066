"""The floating-point operations of a training step, for ``perf/mfu`` and the parameter ``kv_ratio``.

Dimensions: Hq query heads, D head_dim, T tokens of a sequence.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from lrsa_lit.attention import LRSAConfig, mean_top_k
from lrsa_lit.ops.sparse_attention import attended_pairs

_PEAK_TFLOPS = {
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "A10G": 70,
    "A10": 125,
    "V100": 125,
    "RTX 4090": 165,
    "RTX 3090": 71,
}
"""Dense 16-bit matrix throughput from data sheets, without sparsity. The first name found in a device's name counts."""


class Shape(NamedTuple):
    """The sizes of a model that determine its floating-point operations.

    Attributes:
        linear: number of weights that every token is multiplied with: all except the embedding and the head.
        trained: how many of ``linear`` are trained; fewer with adapters.
        head: number of weights of the output head, used only where logits are computed.
        head_trained: how many of ``head`` are trained.
    """

    layers: int
    query_heads: int
    head_dim: int
    linear: int
    trained: int
    head: int
    head_trained: int

    @classmethod
    def of(cls, model: Any) -> Shape:
        """The shape of a causal language model of transformers, with or without adapters."""
        config = model.config.get_text_config()
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        inner = [weight for weight in model.parameters() if weight is not embedding and weight is not head]
        heads = config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            query_heads=heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            linear=sum(_numel(weight) for weight in inner),
            trained=sum(weight.numel() for weight in inner if weight.requires_grad),
            head=head.numel(),
            head_trained=head.numel() if head.requires_grad else 0,
        )


def training_flops(shape: Shape, lengths: Sequence[int], logits: int, rule: LRSAConfig | None) -> int:
    """Floating-point operations of one forward and backward pass over sequences of ``lengths`` tokens, without padding.

    - Linear layers: 2 operations per weight and token, as many in the backward pass for the gradient of the input, and
      as many again for the gradient of a trained weight. So 3x the forward pass if all weights are trained.
    - Attention: 4 Hq D per layer and attended query-key pair (scores and values), 3x with the backward pass.
    - The head: like a linear layer, but only at the positions that get logits.

    Padding, recomputed activations, token selection, norms and the optimizer are not counted, because a good
    implementation saves them. ``logits`` is the number of positions with logits, over all sequences.
    """
    linear = sum(lengths) * (4 * shape.linear + 2 * shape.trained)
    head = logits * (4 * shape.head + 2 * shape.head_trained)
    pairs = sum(_pairs_of_layers(length, shape.layers, rule) for length in lengths)
    return int(linear + head + 3 * 4 * shape.query_heads * shape.head_dim * pairs)


def forward_flops(shape: Shape, lengths: Sequence[int], logits: int, rule: LRSAConfig | None) -> int:
    """:func:`training_flops` for a forward pass alone."""
    pairs = sum(_pairs_of_layers(length, shape.layers, rule) for length in lengths)
    return int(2 * (sum(lengths) * shape.linear + logits * shape.head) + 4 * shape.query_heads * shape.head_dim * pairs)


def kv_ratio(rule: LRSAConfig, tokens: int, layers: int) -> float:
    """Attended query-key pairs as a share of dense causal attention, over all layers, for T >= 1 ``tokens``.

    Dense layers, sinks and raw windows are included. 1.0 means dense; for long texts without dense layers it approaches
    K/L.
    """
    return float(_pairs_of_layers(tokens, layers, rule) / _pairs_of_layers(tokens, layers, None))


def peak_flops(device: str) -> float | None:
    """Peak 16-bit operations per second of a GPU by its name, such as "NVIDIA H100 80GB HBM3"; None if unknown.

    MFU uses it for other dtypes, too, so slower dtypes have a lower MFU.
    """
    for name, tflops in _PEAK_TFLOPS.items():
        if re.search(rf"\b{name}\b", device):
            return tflops * 1e12
    return None


def _numel(weight: Any) -> int:
    """The number of values in a weight: bitsandbytes packs two of them into a byte."""
    state = getattr(weight, "quant_state", None)
    return int(weight.numel() if state is None else state.shape.numel())


def _pairs_of_layers(length: int, layers: int, rule: LRSAConfig | None) -> int | Fraction:
    """Query-key pairs of one head, summed over layers; the mean over heads if they differ."""
    if rule is None:
        return layers * attended_pairs(length, None)
    dense = len(rule.dense_layers)
    system = rule.system
    if rule.head_top_k is not None:
        # The number of pairs is linear in K, and at K = L equals dense attention's.
        none, one = (attended_pairs(length, rule.rule.replace(top_k=top_k)) for top_k in (0, 1))
        return layers * none + layers * mean_top_k(rule, layers) * (one - none)
    each = attended_pairs(length, rule.rule) if system is None else system.attended_pairs(length)
    return dense * attended_pairs(length, None) + (layers - dense) * each
