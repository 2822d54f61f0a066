"""A text, questions about it, and their prompts."""

from lrsa_lit.data.prompts import encode
from lrsa_lit.data.records import Passage, QARecord
from lrsa_lit.models.tiny import tiny_tokenizer

TEXT = " ".join(f"River number {n} is {n * 37 % 100} km long and flows into lake {n * 5 % 7}." for n in range(12))
FIRST, SECOND = "How long is river 3?", "Which lake does it reach?"


def prompt_of(question, text=TEXT):
    """The training prompt's tokens."""
    example = encode(QARecord("x", (Passage("", text),), question, ("a",)), tiny_tokenizer(), 100_000)
    return example["input_ids"][: example["prompt_length"]]


def bare(question):
    """The training prompt's tokens of a record without passages."""
    example = encode(QARecord("x", (), question, ("a",)), tiny_tokenizer(), 100_000)
    return example["input_ids"][: example["prompt_length"]]


def ids_of(text):
    return tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]
