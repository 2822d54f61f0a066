"""One forward pass of the trained model for all terms of an objective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lrsa_lit.models.head import Head, at_head
from lrsa_lit.objectives.objective import Pass, Term
from lrsa_lit.objectives.positions import Positions
from lrsa_lit.objectives.teachers import outputs_of_layers


def summed_losses(model: Any, terms: Sequence[Term], positions: Positions, inputs: Mapping[str, Any]) -> Tensor:
    """Each term's loss, summed over the positions of a batch.

    Args:
        model: the trained model, with its rule enabled.
        terms: at least one term.
        positions: the positions of the batch.
        inputs: the inputs of the model's forward.

    Returns:
        (len(terms),), at least float32.
    """
    count = model.config.get_text_config().num_hidden_layers
    needed = {term: term.layers(count) for term in terms}
    taught = {}
    for teacher in dict.fromkeys(term.teacher for term in terms if term.teacher is not None):
        wanted = {layer for term, layers in needed.items() if term.teacher == teacher for layer in layers}
        taught[teacher] = teacher.run(model, positions.batch, inputs, sorted(wanted))
    own = sorted({layer for layers in needed.values() for layer in layers})
    with outputs_of_layers(model, own) as outputs:

        def losses(hidden: Tensor, head: Head) -> Tensor:
            seen = Pass(positions.targets(), positions, hidden.flatten(0, 1), head, outputs, taught)
            found = torch.stack([term.loss(seen) for term in terms])
            # DDP needs a gradient for every weight, even if it is zero.
            return found if any(term.uses_logits for term in terms) else found + 0 * head.logits(seen.hidden[:1]).sum()

        return at_head(model, losses, **inputs)
