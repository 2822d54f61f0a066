"""Checkpoints of sentence encoders, as a fit writes them."""

import torch

from lrsa_lit.models import Backbone, LoRA
from lrsa_lit.models.checkpoint import describe


def saved(path, seed=0, max_tokens=100, encoder=True):
    """The path of one with random adapters of the tiny model; of a model that answers where it is no encoder."""
    backbone = Backbone("tiny", lora=LoRA(rank=2))
    generator = torch.Generator().manual_seed(seed)
    weights = {
        f"model.{name}": torch.randn(each.shape, generator=generator)
        for name, each in backbone.build().named_parameters()
        if each.requires_grad
    }
    content = {"state_dict": weights, "pytorch-lightning_version": "2.6.6", "global_step": 1}
    describe(content, backbone, None, encoder={"max_tokens": max_tokens} if encoder else None)
    torch.save(content, path)
    return str(path)
