"""The loss inside the output head against logits made whole."""

import pytest
import torch

from lrsa_lit.models import Backbone, head
from lrsa_lit.models.backbone import LoRA
from lrsa_lit.models.tiny import tiny_model


def loss_at_head(model, targets, columns, **inputs):
    return head.at_head(model, lambda hidden, at: at.cross_entropy(hidden.flatten(0, 1), targets.flatten()),
                        columns, **inputs)  # fmt: skip


def reference(model, ids, targets, columns):
    logits = model(input_ids=ids).logits[:, columns].double()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


@pytest.fixture
def tokens():
    torch.manual_seed(0)
    ids, columns = torch.randint(259, (2, 60)), torch.tensor([3, 4, 30, 50])
    return ids, ids[:, columns + 1].index_fill(1, torch.tensor([1]), -100), columns


@pytest.mark.parametrize(("rows", "logits"), [(1, 1 << 25), (3, 1 << 25), (1024, 1 << 25), (1024, 3 * 259), (1024, 1)])
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
def test_loss_and_gradients_are_those_of_whole_logits(tokens, rows, logits, tied, monkeypatch):
    monkeypatch.setattr(head, "ROWS", rows)
    monkeypatch.setattr(head, "LOGITS", logits)
    ids, targets, columns = tokens
    model = tiny_model().double()
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    expected = reference(model, ids, targets, columns)
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    loss = loss_at_head(model, targets, columns, input_ids=ids)
    got = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    for one, other in zip(got, wanted, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_only_the_chosen_positions_reach_the_head(tokens):
    ids, targets, columns = tokens
    model = tiny_model()
    seen = []
    handle = model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    loss_at_head(model, targets, columns, input_ids=ids)
    handle.remove()
    assert seen == [(2, 4, 64)]
    assert model(input_ids=ids).logits.shape == (2, 60, 259), "the head is itself again"


def test_the_head_is_itself_again_after_an_error(tokens):
    ids, targets, columns = tokens
    model = tiny_model()
    with pytest.raises(IndexError):
        loss_at_head(model, targets, columns + 1000, input_ids=ids)
    assert model(input_ids=ids).logits.shape == (2, 60, 259)


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("Granite", {"logits_scaling": 4.0}),
        ("Cohere", {"logit_scale": 0.5}),
        ("Gemma2", {"final_logit_softcapping": 2.0}),
    ],
)
def test_what_a_model_does_to_its_logits_is_done_to_them(tokens, family, change):
    import transformers

    ids, targets, columns = tokens
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = getattr(transformers, f"{family}Config")(vocab_size=259, num_key_value_heads=1, **small, **change)
    model = getattr(transformers, f"{family}ForCausalLM")(config).double()
    expected = reference(model, ids, targets, columns)
    loss = loss_at_head(model, targets, columns, input_ids=ids)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    for one, other in zip(torch.autograd.grad(loss, list(model.parameters())), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)


def test_a_head_that_is_no_linear_layer_makes_the_logits(tokens):
    class Doubled(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.weight = inner, inner.weight

        def forward(self, hidden):
            return 2 * self.inner(hidden)

    ids, targets, columns = tokens
    model = tiny_model().double()
    model.lm_head = Doubled(model.lm_head)
    expected = reference(model, ids, targets, columns)
    torch.testing.assert_close(loss_at_head(model, targets, columns, input_ids=ids), expected, rtol=1e-9, atol=0)


def test_losses_of_examples_are_those_of_each_alone():
    generator = torch.Generator().manual_seed(0)
    model = tiny_model().double()
    # Answers of other lengths in rows of other lengths, padded with a token that is also one of theirs.
    lengths, answers = (60, 43, 51), (4, 1, 6)
    ids = [torch.randint(259, (length,), generator=generator) for length in lengths]
    labels = [row.clone().index_fill(0, torch.arange(len(row) - count), -100)
              for row, count in zip(ids, answers, strict=True)]  # fmt: skip
    together = [torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
                for rows, pad in ((ids, 2), (labels, -100))]  # fmt: skip
    columns = (together[1][:, 1:] != -100).any(dim=0).nonzero()[:, 0]
    losses = head.losses_of_rows(model, together[1][:, 1:][:, columns], columns, input_ids=together[0])
    assert losses.dtype == torch.float64
    expected = []
    for row, count in zip(ids, answers, strict=True):
        own = torch.arange(len(row) - count - 1, len(row) - 1)
        expected.append(reference(model, row[None], row[None, own + 1], own))
    torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-6, atol=0)


def test_adapters_on_a_model(tokens):
    ids, targets, columns = tokens
    model = Backbone("tiny", lora=LoRA(rank=2)).build().eval()
    loss = loss_at_head(model, targets, columns, input_ids=ids)
    torch.testing.assert_close(loss.double(), reference(model, ids, targets, columns), rtol=1e-5, atol=0)


def test_under_autocast_the_head_computes_in_its_dtype(tokens):
    ids, targets, columns = tokens
    model = tiny_model()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_at_head(model, targets, columns, input_ids=ids)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), reference(model, ids, targets, columns), rtol=0.05, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_gradients_outlive_the_forward_pass(dtype):
    """A scaler enlarges them only afterwards, and float16 holds nothing below 6e-8."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 50)
    rows = torch.randn(30, 16, requires_grad=True)
    wanted = torch.randn(30, 50)

    def gradients(factor, scale):
        def loss(logits, targets):
            return factor * (logits * targets).sum()

        with torch.autocast("cpu", dtype=dtype):
            total = head.Head(layer).summed(loss, rows, wanted)
        return torch.autograd.grad(total * scale, [rows, layer.weight, layer.bias])

    for one, other in zip(gradients(1e-9, 1e9), gradients(1.0, 1.0), strict=True):
        assert (one - other).norm() <= 0.01 * other.norm()
