"""Chat templates, compared with what transformers makes of them."""

from enum import StrEnum
from typing import Any

import pytest
from jinja2.exceptions import TemplateRuntimeError
from transformers.utils.chat_template_utils import render_jinja_template

from engine.chat_template import ChatTemplate
from engine.errors import ModelLoadError

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": 'What is <b>"bold"</b>, naïve 😀?'},
    {"role": "assistant", "content": "<think>hm</think>\n\nA weight. "},
    {"role": "user", "content": "  And & italic?\n"},
]
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

TEMPLATES = {
    "special tokens": "{{ bos_token }}{% for m in messages %}{{ m.role }}{{ m['content'] }}{{ eos_token }}{% endfor %}",
    "undefined token": "{{ pad_token }}{{ messages | length }}{% if pad_token is defined %}padded{% endif %}",
    "generation prompt": "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "blank lines": "{%- for m in messages %}\n  {% if loop.first %}\n    1\n  {% endif %}\n{{ m.role -}}\n{% endfor %}",
    "loop controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.role }}"
    "{% if loop.index == 3 %}{% break %}{% endif %}{% endfor %}",
    "namespace": "{% set ns = namespace(last='', n=0) %}{% for m in messages %}{% set ns.last = m.role %}"
    "{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.last }} {{ ns.n }}",
    "namespace of a mapping": "{% set ns = namespace({'a': 1}, self=2) %}{{ ns.a + ns.self }}",
    "JSON": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}"
    "{{ messages[1] | tojson(ensure_ascii=True, separators=(',', ':'), sort_keys=True) }}",
    "generation blocks": "{% set x = 1 %}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% generation %}{% set x = 2 %}{{ m.content }}{{ x }}{% endgeneration %}{% endif %}{% endfor %}{{ x }}",
    "date": "{{ strftime_now('%Y') }}{% if strftime_now is defined %}!{% endif %}",
    "no tools": "{% if tools is not none %}tools{% endif %}{% if not documents %}no documents{% endif %}",
    "macros": "{% macro turn(m) %}[{{ m.role | upper }}] {{ m.content | trim }}{% endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{% endfor %}",
    "text methods": "{% for m in messages %}{{ m.content.split('</think>')[-1].lstrip('\\n') }}"
    "{{ m.content.startswith('What') }}{% endfor %}",
    "slices": "{% for m in messages[::-1] %}{{ loop.index0 }}{{ m.role }}{% endfor %}{{ messages[1:] | length }}",
    "dictionary": "{% set d = dict(a=1, b=messages[0].role) %}{{ d.a }}{{ d['b'] }}"
    "{% for k, v in d.items() %}{{ k }}{% endfor %}",
    "keys": "{{ dict.fromkeys(['a', 'b'], 1) | tojson }}{{ dict([('x', 1)], y=2) | tojson }}",
    "kinds": "{{ messages is string }}{{ messages[0] is mapping }}{{ messages[0].content is string }}"
    "{{ messages[0].tool_calls is defined }}{{ messages[0].get('name', 'nobody') }}",
}


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_agrees_with_transformers(name: str, add_generation_prompt: bool) -> None:
    source = TEMPLATES[name]
    expected, _ = render_jinja_template(
        conversations=[MESSAGES],
        chat_template=source,
        add_generation_prompt=add_generation_prompt,
        **SPECIAL_TOKENS,
    )
    assert ChatTemplate(source, SPECIAL_TOKENS).render(MESSAGES, add_generation_prompt) == expected[0]


@pytest.mark.parametrize("name", ["thinking", "reasoning", "reasoning_content"])
def test_reasoning_is_found_by_any_name(name: str) -> None:
    source = "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}|{{ m.content }};{% endfor %}"
    messages = [*MESSAGES, {"role": "assistant", "content": "Yes.", name: "Italic slants."}]
    expected, _ = render_jinja_template(conversations=[messages], chat_template=source)
    assert "Italic" in expected[0]
    assert ChatTemplate(source, {}).render(messages, False) == expected[0]


def test_what_a_template_raises_comes_through() -> None:
    with pytest.raises(Exception, match="roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}", {}).render(MESSAGES, True)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__base__ }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ dict.mro() }}",
        "{{ dict['x'].mro() }}",
        "{{ dict.pop(messages[0], 'role') }}",
        "{{ dict.update(messages[0], role='system') }}",
        "{{ raise_exception.__globals__.json }}",
        "{{ messages.append(1) }}",
        "{% set ns = namespace(__html__='x') %}",
        "{% set ns = namespace() %}{% set ns.__html__ = 'x' %}",
        "{{ '{0.__class__.__base__}'.format(1) }}",
    ],
)
def test_a_template_cannot_leave_the_sandbox(source: str) -> None:
    with pytest.raises(TemplateRuntimeError):  # SecurityError, or UndefinedError: there is no such thing
        ChatTemplate(source, {}).render(MESSAGES, True)


def test_a_template_sees_plain_data_only() -> None:
    class Role(StrEnum):
        USER = "user"

        def save(self) -> str:
            return "saved"

    def render(message: dict[str, Any]) -> str:
        return ChatTemplate("{{ messages[0].role }} {{ messages[0].role.save is defined }}", {}).render([message], True)

    assert render({"role": Role.USER}) == "user False"
    with pytest.raises(TypeError):
        render({"role": object()})


@pytest.mark.parametrize(
    "source",
    [
        "{% for message in %}",
        "{% generation %}",
        "{{ messages",
        "{% for m in messages %}" * 25 + "{% endfor %}" * 25,  # more than Python nests
        "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    ],
    ids=["loop", "block", "expression", "nested loops", "nested expression"],
)
def test_a_broken_template_is_an_error_at_once(source: str) -> None:
    with pytest.raises(ModelLoadError, match="not valid Jinja"):
        ChatTemplate(source, {})
