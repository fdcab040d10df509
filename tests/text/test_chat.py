"""Chat templates: as transformers renders them, and within bounds whoever wrote them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.text.small import text_model, tokenizer
from text.chat import ChatTemplate, ChatTemplateFailed

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is <b>2 & 2</b>?"},
]

CHATML = """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' }}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""

FANCY = """{%- set ns = namespace(first=true) -%}
{{- bos_token }}
{%- for m in messages %}
  {%- if m.role == 'system' and not loop.first %}{% continue %}{% endif %}
  {%- if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}
  {{- m | tojson(indent=2) }}{{ m.content.split('?')[0] | upper }}{{ ns.first }}
  {%- set ns.first = false %}
{%- endfor %}{{ messages | map(attribute='role') | join(',') }}{{ "x" * 3 }}"""


@pytest.mark.parametrize("template", [CHATML, FANCY])
@pytest.mark.parametrize("prompting", [True, False])
def test_a_template_renders_as_transformers_does(template: str, prompting: bool) -> None:
    own = tokenizer()
    right = own.apply_chat_template(
        MESSAGES,
        chat_template=template,
        tokenize=False,
        add_generation_prompt=prompting,
        bos_token="<s>",
    )
    made = ChatTemplate(template, {"bos_token": "<s>", "eos_token": own.eos_token})
    assert made.render(MESSAGES, add_generation_prompt=prompting) == right


def test_a_models_own_template_is_taken() -> None:
    chat = text_model().chat
    assert chat.render(MESSAGES[1:], add_generation_prompt=True) == (
        "<|user|>What is <b>2 & 2</b>?<|end|><|assistant|>"
    )


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ lipsum }}{{ lipsum.__globals__['os'].popen('id').read() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ 'x' * 1000000000 }}",
        "{{ 1000000000 * 'x' }}",
        "{{ [1] * 1000000000 }}",
        "{{ 10 ** 10 ** 10 }}",
        "{{ 'x'.center(1000000000) }}",
        "{{ 'x'.ljust(99999999) }}",
        "{{ '%0999999999d' % 1 }}",
        "{{ '{:0999999999d}'.format(1) }}",
        "{{ 'x' | center(1000000000) }}",
        "{{ '%s' | format(1) }}",
        "{{ [1, 2] | batch(1000000000, 1) | list }}",
        "{{ range(1000000000) | list }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
        "{% set ns = namespace(x='x' * 1000) %}"
        "{% for a in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x='x' * 1000) %}"
        "{% for a in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='x' * 1000) %}"
        "{% for a in range(99) %}{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}",
        "{% set ns = namespace(x='x' * 1000) %}"
        "{% for a in range(99) %}{% set ns.x = ns.x.replace('x', 'xx') %}{% endfor %}",
        "{% set ns = namespace(x='x' * 1000) %}"
        "{% for a in range(99) %}{% set ns.x = ns.x | replace('x', 'xx') %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ messages[9]['content'] }}",
        "{{ nothing.at.all }}",
        "{{ 1 / 0 }}",
        "{% if %}",
        "{{ 'x' | no_such_filter }}",
        "{{ raise_exception('system messages are not supported') }}",
        "x" * 500_000,
    ],
)
def test_a_template_that_is_broken_or_means_harm_is_refused(template: str) -> None:
    with pytest.raises(ChatTemplateFailed) as refused:
        ChatTemplate(template).render(MESSAGES, add_generation_prompt=True)
    assert len(str(refused.value)) < 1000


def test_what_a_template_says_of_the_messages_is_told() -> None:
    template = "{{ raise_exception('the roles must alternate') }}"
    with pytest.raises(ChatTemplateFailed, match="the roles must alternate"):
        ChatTemplate(template).render(MESSAGES)


def test_further_variables_reach_the_template() -> None:
    tools: list[dict[str, Any]] = [{"type": "function"}]
    template = "{{ tools | length }}{% if not thinking %}no{% endif %}"
    assert ChatTemplate(template).render(MESSAGES, tools=tools, thinking=False) == "1no"
