"""How much arithmetic a training step needs: the one count behind ``perf/mfu`` and the ``kv_ratio`` param.

Hq query heads, D head_dim, T tokens of a sequence.
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
"""Dense 16-bit matrix products of the data sheets, without sparsity; the first name found in a device's name counts."""


class Shape(NamedTuple):
    """What of a model decides its arithmetic.

    Attributes:
        linear: weights that every token is multiplied with: all but the embedding and the head.
        trained: those of ``linear`` that are trained; fewer with adapters.
        head: weights of the output head, multiplied only where logits are computed.
        head_trained: those of ``head`` that are trained.
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

    - Linear layers: 2 operations for each weight and token, and as many in the backward pass for the gradient of the
      input, and again for that of the weight where it is trained: 3x the forward pass when all weights are.
    - Attention: 4 Hq D for each layer and query-key pair that is attended to (scores, and values), 3x with backward.
    - The head: as a linear layer, only at the positions that get logits.

    Padding, recomputed activations, the choice of what is kept, norms and the optimizer are not counted: they are what
    a good implementation saves. ``logits`` is the number of positions that get logits, of all sequences together.
    """
    linear = sum(lengths) * (4 * shape.linear + 2 * shape.trained)
    head = logits * (4 * shape.head + 2 * shape.head_trained)
    pairs = sum(_pairs_of_layers(length, shape.layers, rule) for length in lengths)
    return int(linear + head + 3 * 4 * shape.query_heads * shape.head_dim * pairs)


def forward_flops(shape: Shape, lengths: Sequence[int], logits: int, rule: LRSAConfig | None) -> int:
    """As :func:`training_flops`, of a forward pass alone."""
    pairs = sum(_pairs_of_layers(length, shape.layers, rule) for length in lengths)
    return int(2 * (sum(lengths) * shape.linear + logits * shape.head) + 4 * shape.query_heads * shape.head_dim * pairs)


def kv_ratio(rule: LRSAConfig, tokens: int, layers: int) -> float:
    """Share of the query-key pairs of dense causal attention that a rule attends to, over all layers of a model.

    It is that of a sequence of T >= 1 tokens. Dense layers count with all their pairs, sinks and raw windows with those
    that they are. 1.0 is dense; for long texts and no dense layer it comes near K/L.
    """
    return float(_pairs_of_layers(tokens, layers, rule) / _pairs_of_layers(tokens, layers, None))


def peak_flops(device: str) -> float | None:
    """Most 16-bit operations a second of a GPU by its name, as in "NVIDIA H100 80GB HBM3"; None if it is not known.

    It is the measure for other dtypes too, which makes their MFU as low as they are slow.
    """
    for name, tflops in _PEAK_TFLOPS.items():
        if re.search(rf"\b{name}\b", device):
            return tflops * 1e12
    return None


def _numel(weight: Any) -> int:
    """Numbers that a weight stands for: bitsandbytes packs two of them into a byte."""
    state = getattr(weight, "quant_state", None)
    return int(weight.numel() if state is None else state.shape.numel())


def _pairs_of_layers(length: int, layers: int, rule: LRSAConfig | None) -> int | Fraction:
    """Of one head in each layer; where heads differ, of their mean."""
    if rule is None:
        return layers * attended_pairs(length, None)
    dense = len(rule.dense_layers)
    system = rule.system
    if rule.head_top_k is not None:
        # Pairs are linear in K, and as many as dense attention has at K = L.
        none, one = (attended_pairs(length, rule.rule.replace(top_k=top_k)) for top_k in (0, 1))
        return layers * none + layers * mean_top_k(rule, layers) * (one - none)
    each = attended_pairs(length, rule.rule) if system is None else system.attended_pairs(length)
    return dense * attended_pairs(length, None) + (layers - dense) * each
