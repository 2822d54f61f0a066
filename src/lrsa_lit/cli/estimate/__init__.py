"""``lrsa fit … --estimate``: what memory and time a fit will take, measured on a few layers of its model.

Every layer of a kind costs the same. So the configured training runs for some steps on models of the configured width
with two and four layers and random weights, and the rest follows: seconds, and the peaks of memory in the passes and in
the optimizer's step, grow linearly with the layers. Nothing is loaded but the model's config and tokenizer, nothing is
recorded or written.
"""

from lrsa_lit.cli.estimate.layers import Layers, cost_of, extrapolate
from lrsa_lit.cli.estimate.probe import Batches, Cost, measure

__all__ = ["Batches", "Cost", "Layers", "cost_of", "extrapolate", "measure"]
