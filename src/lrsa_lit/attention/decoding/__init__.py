"""Generation: prompts in calls of bounded length, then token by token, with a CUDA graph where one is possible."""

from lrsa_lit.attention.decoding.chunked_prefill import prefill
from lrsa_lit.attention.decoding.decoder import Decoder, graphed_decoding, serving
from lrsa_lit.attention.decoding.end_of_prompt import end_prompt
from lrsa_lit.attention.decoding.greedy import Greedy, greedy_tokens, single_token_steps
from lrsa_lit.attention.decoding.ruled_generate import generate_under_rule
from lrsa_lit.attention.decoding.turns import read_prompts

__all__ = [
    "Decoder",
    "Greedy",
    "end_prompt",
    "generate_under_rule",
    "graphed_decoding",
    "greedy_tokens",
    "prefill",
    "read_prompts",
    "serving",
    "single_token_steps",
]
