"""Rendering by a model's chat template, and its arguments."""

import pytest
from chat_templates import LLAMA3, QWEN3, SMOLLM3, TEMPLATES, with_template
from helpers import refused
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lrsa_lit.chat_template import render, with_arguments
from lrsa_lit.data.fingerprint import of_tokenizer
from lrsa_lit.errors import UserError

MESSAGES = [
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Ishmael"},
    {"role": "user", "content": "Why?"},
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("template", [QWEN3, SMOLLM3], ids=["qwen3", "smollm3"])
@pytest.mark.parametrize("value", [True, False])
def test_an_argument_is_what_transformers_makes_of_it(template, value):
    tokenizer = with_template(template)
    expected = tokenizer.apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True, enable_thinking=value
    )
    assert render(MESSAGES, with_arguments(tokenizer, {"enable_thinking": value})) == expected
    assert ("<think>" in expected) == (not value)


@pytest.mark.parametrize("start", ["", "\n", "  ", "{#- a comment #}\n\n", "{%- if false %}{% endif %}"])
@given(value=JSON)
def test_every_json_value_arrives_and_nothing_else_changes(start, value):
    tokenizer = with_template(start + "[{{ [x, y is defined] | string }}]{{ y }}")
    expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True, x=value)
    assert render(MESSAGES, with_arguments(tokenizer, {"x": value})) == expected


def test_the_tokenizer_that_was_given_stays_as_it_is():
    tokenizer = with_template(SMOLLM3)
    assert with_arguments(tokenizer, {}) is tokenizer
    with_arguments(tokenizer, {"enable_thinking": False})
    assert tokenizer.chat_template == SMOLLM3


def test_a_saved_tokenizer_has_the_arguments_as_defaults(tmp_path):
    tokenizer = with_arguments(with_template(SMOLLM3), {"enable_thinking": False})
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert render(MESSAGES, loaded) == render(MESSAGES, tokenizer)
    again = with_arguments(loaded, {"enable_thinking": True})
    assert render(MESSAGES, again) == render(MESSAGES, with_template(SMOLLM3))
    asked = loaded.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True, enable_thinking=True)
    assert asked == render(MESSAGES, again)


def test_cached_data_knows_the_arguments():
    plain = with_template(SMOLLM3)
    prints = {of_tokenizer(with_arguments(plain, {"enable_thinking": value})) for value in (True, False)}
    assert len({*prints, of_tokenizer(plain)}) == 3


@pytest.mark.parametrize(
    ("template", "arguments", "named"),
    [
        pytest.param(QWEN3, {"enable_thinkin": False}, "enable_thinking", id="misspelt"),
        pytest.param(LLAMA3, {"enable_thinking": False}, "date_string", id="no such argument"),
        pytest.param(LLAMA3, {"messages": []}, "", id="messages"),
        pytest.param(LLAMA3, {"bos_token": "x"}, "", id="special token"),
        pytest.param(LLAMA3, {"add_generation_prompt": False}, "", id="always passed"),
        pytest.param(QWEN3, {"namespace": 1}, "", id="Jinja's own"),
        pytest.param(QWEN3, {"ns": 1}, "", id="set by the template"),
        pytest.param(QWEN3, {"enable_thinking": float("nan")}, "", id="not a number"),
        pytest.param(QWEN3, {"enable_thinking": {1: 2}}, "", id="key that is no text"),
        pytest.param(QWEN3, {"enable_thinking": object()}, "", id="not of JSON"),
    ],
)
def test_arguments_without_effect_are_refused(template, arguments, named):
    with refused(f"template_arguments.{next(iter(arguments))}", reason=named):
        with_arguments(with_template(template), arguments)


def test_the_default_of_several_templates_takes_the_arguments():
    tokenizer = with_template({"default": SMOLLM3, "tool_use": "{{ messages }}"})
    changed = with_arguments(tokenizer, {"enable_thinking": False})
    assert render(MESSAGES, changed).endswith("</think>\n")
    assert changed.chat_template["tool_use"] == tokenizer.chat_template["tool_use"]


def test_a_template_may_use_the_tags_that_transformers_adds():
    tokenizer = with_template(
        "{% for m in messages %}{% generation %}{{ m.content }}{{ x }}{% endgeneration %}{% break %}{% endfor %}"
    )
    assert render(MESSAGES, with_arguments(tokenizer, {"x": "!"})) == "Who?!"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        pytest.param("{{ raise_exception('a system message must come first') }}", "a system message", id="raises"),
        pytest.param("{% for %}", "", id="no Jinja"),
        pytest.param("{{ messages[0].content + 1 }}", "", id="wrong types"),
        pytest.param("{{ 1 / 0 }}", "zero", id="another error"),
        pytest.param({"tool_use": "x"}, "", id="no default"),
    ],
)
def test_a_template_that_fails_names_the_model(template, said):
    tokenizer = with_template(template)
    tokenizer.name_or_path = "some/model"
    with refused("tokenizer", reason=said) as caught:
        render(MESSAGES, tokenizer)
    assert "some/model" in caught.value.reason
    with pytest.raises(UserError):
        with_arguments(tokenizer, {"x": 1})


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_conversations_are_those_of_transformers(template):
    tokenizer = with_template(template)
    expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert render(MESSAGES, tokenizer) == expected
