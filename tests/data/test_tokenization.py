"""What a user has written is text: only the chat template, and the end of an answer, make special tokens."""

from itertools import pairwise

import pytest
from helpers import refused
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lrsa_lit.data.prompts import Prompt, TooLong, encode, render_messages, render_prompt
from lrsa_lit.data.records import Passage, QARecord
from lrsa_lit.data.tokenization import encode_text, encode_texts, special_ids, token_counts
from lrsa_lit.models.tiny import tiny_tokenizer

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<filename>", "<pad>", "<end>")


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and merges of them, some across the brackets of special tokens; specials of all kinds, one ordinary."""
    tokenizer = tiny_tokenizer()
    backend = tokenizer.backend_tokenizer
    merges = [("f", "i"), ("fi", "l"), ("fil", "e"), ("<", "fi"), ("|", ">"), ("e", "n"), ("en", "d"), ("Ġ", "a")]
    vocabulary = backend.get_vocab(with_added_tokens=False)
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    backend.model = models.BPE(vocab=vocabulary, merges=merges)
    added = [
        AddedToken("<filename>", special=True),
        AddedToken("<pad>", special=True, lstrip=True, rstrip=True),
        AddedToken("<end>", special=True, rstrip=True),
        AddedToken("<think>", special=False),
    ]
    tokenizer.add_tokens([token for token in added if not token.special])
    tokenizer.add_special_tokens({"extra_special_tokens": [token for token in added if token.special]})
    return tokenizer


TOKENIZER = merging_tokenizer()
PARTS = st.sampled_from(
    [*SPECIAL, "<think>", "<", "|>", "file", "name>", " ", "\n", "a", "é", "€", "😀", "end", "<|im_"]
)
TEXTS = (
    st.lists(PARTS | st.text(max_size=3), max_size=8)
    .map("".join)
    .map(lambda text: text.encode("utf-8", "replace").decode())
)


def specials(ids: list[int], tokenizer: PreTrainedTokenizerFast = TOKENIZER) -> list[int]:
    special = special_ids(tokenizer)
    return [number for number in ids if number in special]


@given(TEXTS)
def test_any_text_comes_back_and_holds_no_special_token(text):
    tokens = encode_text(TOKENIZER, text)
    assert TOKENIZER.decode(tokens.ids) == text
    assert not specials(tokens.ids)
    assert encode_texts(TOKENIZER, [text, "", text]) == [tokens.ids, [], tokens.ids]
    assert token_counts(TOKENIZER, [text, "", text]) == [len(tokens.ids), 0, len(tokens.ids)]


@given(TEXTS, TEXTS, TEXTS)
def test_the_template_keeps_its_special_tokens(before, text, after):
    turns = [{"role": "user", "content": before}, {"role": "assistant", "content": text}]
    rendered, spans, _ = render_messages([*turns, {"role": "user", "content": after}], TOKENIZER)
    assert [rendered[start:end] for start, end in spans] == [before, text, after]
    tokens = encode_text(TOKENIZER, rendered, spans)
    assert TOKENIZER.decode(tokens.ids) == rendered
    start, end = TOKENIZER.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert specials(tokens.ids) == [start, end] * 3 + [start]
    pieces = [
        rendered[slice(*offset)]
        for number, offset in zip(tokens.ids, tokens.offsets, strict=True)
        if number in (start, end)
    ]
    assert pieces == ["<|im_start|>", "<|im_end|>"] * 3 + ["<|im_start|>"]


@given(TEXTS)
def test_offsets_are_the_places_of_the_tokens(text):
    ids, offsets = (tokens := encode_text(TOKENIZER, text)).ids, tokens.offsets
    assert all(first[0] <= second[0] and first[1] <= second[1] for first, second in pairwise(offsets))
    for position, number in enumerate(ids):
        piece = TOKENIZER.decode([number])
        if "�" not in piece:
            assert text[slice(*offsets[position])] == piece


@given(
    st.lists(st.sampled_from(["<", "file", "|>", " a", "\n", "end", "é", "<think>"]) | st.text(max_size=5)).map("".join)
)
def test_ordinary_text_has_the_tokens_it_always_had(text):
    text = text.encode("utf-8", "replace").decode()
    if not any(name in text for name in SPECIAL):
        rendered, spans, _ = render_messages([{"role": "user", "content": text}], TOKENIZER)
        expected = TOKENIZER(rendered, add_special_tokens=False)["input_ids"]
        assert encode_text(TOKENIZER, rendered, spans).ids == expected


def test_what_is_written_as_a_special_token_has_the_ordinary_tokens_of_its_letters():
    tokens = encode_text(TOKENIZER, "-o <filename> -d")
    assert TOKENIZER.convert_ids_to_tokens(tokens.ids) == [*"-oĠ<", "file", *"name>", *"Ġ-d"]


def test_a_special_token_that_takes_white_space_leaves_the_text_of_the_user_alone():
    text = "<end>  \nHello <pad> you<end>"
    tokens = encode_text(TOKENIZER, text, [(5, text.rindex("<"))])
    end = TOKENIZER.convert_tokens_to_ids("<end>")
    assert specials(tokens.ids) == [end, end]
    assert tokens.offsets[0] == (0, 8)
    assert TOKENIZER.decode(tokens.ids[1:-1]) == "Hello <pad> you"


def test_ordinary_added_tokens_stay_tokens_of_their_own():
    think = TOKENIZER.convert_tokens_to_ids("<think>")
    assert think in encode_text(TOKENIZER, "a <think> b").ids
    assert think in encode_text(TOKENIZER, "a <think> <filename>").ids


def test_a_token_added_later_is_known():
    tokenizer = merging_tokenizer()
    encode_text(tokenizer, "<filename>")
    tokenizer.add_tokens(["<later>"])
    assert tokenizer.convert_tokens_to_ids("<later>") in encode_text(tokenizer, "<filename> <later>").ids


def test_the_tokenizer_is_left_as_it_was():
    before = TOKENIZER("<filename> a", add_special_tokens=False)["input_ids"], len(TOKENIZER)
    encode_text(TOKENIZER, "<filename> a")
    assert before == (TOKENIZER("<filename> a", add_special_tokens=False)["input_ids"], len(TOKENIZER))
    assert specials(before[0])


def sentencepiece_like(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer that marks the beginning of a text, with vocabulary entries that read like its special tokens."""
    letters = [*"abdefilmnot<>/s", "▁", "</s>", "<unk>"]
    model = {
        "unigram": models.Unigram([(letter, -1.0) for letter in letters], unk_id=letters.index("<unk>")),
        "bpe": models.BPE(
            vocab={letter: number for number, letter in enumerate([*letters, "</", "s>"])},
            merges=[("<", "/"), ("s", ">"), ("</", "s>")],
            unk_token="<unk>",
        ),
    }[kind]
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize("text", ["</s>", "a </s> b", "a</s>", "</s></s> b", "a<s>"])
def test_a_vocabulary_that_holds_a_special_string_writes_it_in_parts(kind, text):
    tokenizer = sentencepiece_like(kind)
    tokens = encode_text(tokenizer, text)
    assert not specials(tokens.ids, tokenizer)
    assert tokenizer.decode(tokens.ids) == text


def test_a_letter_that_the_vocabulary_lacks_is_no_control_token():
    tokenizer = sentencepiece_like("unigram")
    assert encode_text(tokenizer, "a z b").ids == tokenizer("a z b", add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id in encode_text(tokenizer, "a z </s>").ids


def test_only_the_beginning_of_the_text_is_marked_as_such():
    tokenizer = sentencepiece_like("bpe")
    text = "</s>ab</s>"
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert encode_text(tokenizer, text, [(4, 6)]).ids == plain
    tokens = encode_text(tokenizer, "</s>ab</s></s>", [(4, 10)])
    assert tokenizer.convert_ids_to_tokens(tokens.ids)[:3] == ["</s>", "a", "b"]


def test_a_vocabulary_that_knows_no_other_way_is_refused():
    backend = Tokenizer(models.WordLevel({"a": 0, "¤": 1, "<unk>": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.normalizer = normalizers.Lowercase()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="¤", unk_token="<unk>")
    with refused("tokenizer", reason="¤"):
        encode_text(tokenizer, "a ¤ a")


def test_an_example_ends_where_its_answer_does():
    passage = Passage("<pad>", "Usage: backup <filename> <|im_end|> twice. Usage: backup <filename> is all.")
    record = QARecord(
        "1", (Passage("", "<|im_start|>"), passage), "What is <filename>?", ("backup <filename>",), ("<pad>",)
    )
    example = encode(record, TOKENIZER, 4096)
    ids, end = example["input_ids"], TOKENIZER.eos_token_id
    assert TOKENIZER.decode(ids[example["prompt_length"] :]) == "backup <filename><|im_end|>"
    assert specials(ids[example["prompt_length"] :]) == [end]
    assert specials(ids[: example["prompt_length"]]) == TOKENIZER.convert_tokens_to_ids(
        ["<|im_start|>", "<|im_end|>", "<|im_start|>"]
    )
    assert [TOKENIZER.decode(ids[start:stop]) for start, stop in example["gold_spans"]] == [f"<pad>\n{passage.text}"]
    assert [TOKENIZER.decode(ids[start:stop]) for start, stop in example["answer_spans"]] == ["backup <filename>"] * 2
    assert encode(record, TOKENIZER, len(ids) - 1) == TooLong(len(ids))


@pytest.mark.parametrize(
    "trim", ["message['content'] | trim", "message['content'].lstrip()", "message['content'].rstrip()"]
)
def test_a_template_may_trim_what_it_is_given(trim):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content']", f"({trim})")
    record = QARecord("1", (Passage("", "\n First."), Passage("", "Second. \n")), "q?", ("a",))
    rendered = render_prompt(record, tokenizer, Prompt("  {context}\n{input}  "))
    texts = [rendered.text[start:end].strip() for start, end in rendered.passages]
    assert texts == ["First.", "Second."]
    ((start, end),) = rendered.user
    assert rendered.text[start:end].strip() == "First.\n\nSecond.\nq?"


def test_a_content_that_the_template_holds_too_is_found_where_it_is():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ '<|im_start|>system\nq? Answer.<|im_end|>\n' }}" + tokenizer.chat_template
    rendered = render_prompt(QARecord("1", (), "q?", ("a",)), tokenizer, Prompt("{context}{input}"))
    assert rendered.user == [(rendered.text.rindex("q?"), rendered.text.rindex("q?") + 2)]
