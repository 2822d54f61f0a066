import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def merging() -> PreTrainedTokenizerFast:
    """Bytes, but "Cde" is one token alone and three behind a blank: texts have more tokens joined than apart."""
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ĠC", "Cd", "Cde"]
    merges = [("Ġ", "C"), ("C", "d"), ("Cd", "e")]
    backend = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend)
