"""A model that says what a test wants to hear, by its weights: every way to generate goes through it."""

import itertools

import torch

from lrsa_lit.models.tiny import tiny_model, tiny_tokenizer


def scripted_model(*texts):
    """A tiny model that goes on after each character or special token of a text with the next one.

    No token may stand twice in all texts together, but as the last one of a text. Attention is computed as ever, but
    adds nothing.
    """
    chains = [tiny_tokenizer()(text, add_special_tokens=False)["input_ids"] for text in texts]
    said = [token for chain in chains for token in chain[:-1]]
    assert len(said) == len(set(said)), "two tokens would follow one"
    model = tiny_model().eval()
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        # A dimension for each token that another one follows; all others share those that are left.
        embedding[:, : len(said)] = 0
        embedding[said] = torch.eye(len(said), embedding.shape[1])
        head.zero_()
        for chain in chains:
            for token, following in itertools.pairwise(chain):
                head[following, said.index(token)] = 1
    return model
