"""A text, questions about it, their prompts, and what the tests of ``lrsa ask`` share."""

import io
import re

import torch

from lrsa_lit.attention import LRSAConfig, enable
from lrsa_lit.data.prompts import encode
from lrsa_lit.data.records import Passage, QARecord
from lrsa_lit.models.generation import stop_tokens
from lrsa_lit.models.tiny import tiny_model, tiny_tokenizer

TEXT = " ".join(f"River number {n} is {n * 37 % 100} km long and flows into lake {n * 5 % 7}." for n in range(12))
RULE = LRSAConfig(sink_size=4, lag_size=32, top_k=8)
FLAGS = ["--lag-size", "32", "--top-k", "8", "--sink-size", "4"]
NEW = 6
ASK = ["ask", "--model", "tiny", "--max-new-tokens", str(NEW)]
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


class Terminal(io.StringIO):
    """What is typed, on something that says it is a terminal; Ctrl-C where it runs dry, if asked for."""

    def __init__(self, typed, *, interrupted=False):
        super().__init__(typed)
        self._interrupted = interrupted

    def isatty(self):
        return True

    def readline(self, *size):
        line = super().readline(*size)
        if not line and self._interrupted:
            raise KeyboardInterrupt
        return line


def words(ids):
    return tiny_tokenizer().decode(ids, skip_special_tokens=True).strip()


@torch.no_grad()
def greedy(model, prompt):
    """The answer's tokens by parallel passes over everything, without any cache."""
    ids = list(prompt)
    while len(ids) < len(prompt) + NEW:
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in stop_tokens(tiny_tokenizer()):
            break
    return ids[len(prompt) :]


def counts(shown):
    found = re.findall(r"^([\d,]+) tokens read, ([\d,]+) kept per head \((\d+) %\)$", shown, flags=re.MULTILINE)
    return [tuple(int(number.replace(",", "")) for number in line) for line in found]


def saved(folder, rule=None, **sizes):
    """A model folder as a fit's export leaves it."""
    model = tiny_model(**sizes)
    (model if rule is None else enable(model, rule)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)
