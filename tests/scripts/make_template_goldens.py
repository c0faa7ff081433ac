#!/usr/bin/env python3
"""Writes what transformers makes of small chat templates, one for each thing that templates use.

    pip install transformers==5.23.0 jinja2==3.1.6
    make_template_goldens.py tests/goldens/text/templates.json

The result is {messages, tools, cases: [{name, template, with_tools, text}]}; `text` is null where transformers fails.
"""
import json
import sys

from transformers.utils.chat_template_utils import _compile_jinja_template

MESSAGES = [
    {"role": "system", "content": "  Be brief.  \n"},
    {"role": "user", "content": "été <b> & \"quotes\" 'single' 😀\n\tx\x01"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes.", "score": 1.5, "flag": True, "nothing": None},
    {"role": "user", "content": "aaa bbb  ccc"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "zeta",
            "parameters": {"z": 1, "a": [1.0, 1e-07, 1e20, 123456789.125, -0.0], "items": {}, "empty": [], "é": None},
        },
    }
]
TEMPLATES = {
    "for_and_generation_prompt": "{% for m in messages %}<{{ m.role }}>{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}",
    "trim_and_lstrip_blocks": "a\n  {% if true %}\n    b\n  {% endif %}\n  {# note #}\nc\n\n",
    "minus_and_plus": "a\n  {%- if true -%}\n  b  \n  {%- endif %}\n  {%+ if true +%}\n c {% endif %}\nd",
    "trailing_newline": "{{ 'a' }}\n",
    "two_trailing_newlines": "{{ 'a' }}\n\n",
    "special_names": "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}|{{ unk_token is defined }}",
    "none_and_undefined": "{{ none }}|{{ nothing }}|{{ tools is none }}|{{ documents is none }}|{{ messages[2].nothing }}",
    "booleans_and_numbers": "{{ true }} {{ 1 + 2 }} {{ 7 // 2 }} {{ 7 / 2 }} {{ 2 ** 3 }} {{ -7 % 3 }} {{ 1.0 }} {{ 10 | int }}",
    "printed_values": "{{ messages[2] }} {{ [1, 'a', none, true, 'it\\'s'] }} {{ ('a', 1) }} {{ {} }}",
    "tojson": "{{ tools | tojson }}",
    "tojson_messages": "{% for m in messages %}{{ m | tojson }}\n{% endfor %}",
    "tojson_indent": "{{ tools | tojson(indent=4) }}",
    "tojson_options": "{{ tools[0] | tojson(sort_keys=true, separators=(',', ':'), ensure_ascii=true) }}"
    "{{ messages[1].content | tojson(ensure_ascii=True) }}",
    "tojson_literals": "{{ {'b': 1, 'a': none, 2: true} | tojson }} {{ 'a/b' | tojson }} {{ ('x', 1) | tojson }}",
    "tojson_undefined": "{{ nothing | tojson }}",
    "string_methods": "{% set c = messages[0].content %}[{{ c.strip() }}][{{ c.lstrip() }}][{{ c.rstrip() }}]"
    "[{{ c.upper() }}][{{ c.title() }}][{{ c.replace('e', 'E') }}][{{ c.find('b') }}]"
    "{{ c.startswith('  B') }}{{ c.endswith(('x', ' \n')) }}{{ 'brief' in c }}[{{ 'x.y.'.strip('.') }}]",
    "split": "{% set c = messages[2].content %}[{{ c.split('</think>')[-1].lstrip('\n') }}]"
    "[{{ c.split('</think>')[0].split('<think>') | last }}]{{ messages[3].content.split() }}{{ 'a,b,c'.split(',', 1) }}",
    "slices": "{{ messages[1:] | length }} {{ messages[:-1] | length }} {{ 'abcdef'[1:4] }} {{ 'abcdef'[::-1] }} {{ messages[-1].role }}",
    "loop_variables": "{% for m in messages %}{{ loop.index }}{{ loop.index0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}"
    "{{ loop.revindex }}{{ (loop.previtem or {}).role }}{{ (loop.nextitem or {}).role }};{% endfor %}",
    "loop_controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.role }}"
    "{% if loop.index == 3 %}{% break %}{% endif %},{% endfor %}",
    "loop_filter_else": "{% for m in messages if m.role == 'tool' %}{{ m }}{% else %}no tools{% endfor %}",
    "namespace": "{% set ns = namespace(n=0, last='') %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% set ns.last = m.role %}{% endfor %}{{ ns.n }}{{ ns.last }}",
    "loop_scope": "{% set x = 1 %}{% for m in messages %}{% set x = x + 1 %}{% endfor %}{{ x }}",
    "set_block": "{% set t %}a{{ 1 }}{% endset %}{{ t }}{{ t | length }}",
    "macro": "{% macro tag(m, close='!') %}<{{ m.role }}{{ close }}>{% endmacro %}{{ tag(messages[0]) }}{{ tag(messages[1], close='?') }}",
    "dict_methods": "{% for k, v in tools[0].function.items() %}{{ k }}={{ v | length }};{% endfor %}"
    "{{ tools[0].get('x', 'd') }}{{ tools[0].keys() | list }}{{ tools[0]['function'].parameters['items'] }}",
    "filters": "{{ [3, 1, 2] | sort | join(', ') }} {{ messages | map(attribute='role') | unique | list }} {{ nothing | default('d') }}"
    " {{ messages | selectattr('role', 'equalto', 'user') | list | length }} {{ ' a ' | trim }} {{ {'b': 1, 'a': 2} | dictsort }}"
    " {{ 'ab' | first }} {{ 'a\nb' | indent(2) }} {{ 'x' | string }} {{ messages | rejectattr('role', 'in', ['user']) | map(attribute='role') | join('/') }}",
    "tests": "{{ messages is iterable }}{{ none is iterable }}{{ 'a' is string }}{{ messages[0] is mapping }}{{ 1 is number }}{{ 1.5 is float }}{{ 1 is integer }}"
    "{{ messages is sequence }}{{ nothing is not defined }}{{ true is true }}{{ 3 is odd }}{{ 3 is divisibleby 3 }}{{ true is boolean }}",
    "conditions": "{{ 'a' if false else 'b' }}{{ 'x' if false }}{{ not messages }}{{ 1 == 1.0 }}{{ 'a' < 'b' }}{{ [] or 'e' }}{{ 1 and 'f' }}{{ 1 < 2 < 3 }}",
    "concatenation": "{{ 'a' ~ 1 ~ none ~ true ~ 1.0 }}{{ 'a' + 'b' }}{{ ['a'] + ['b'] }}{{ 'ab' * 2 }}",
    "format": "{{ '%s-%d' | format('a', 3) }}{{ '{}-{x}'.format('a', x=3) }}",
    "generation_blocks": "{% for m in messages %}{% if m.role == 'assistant' %}\n{% generation %}\n{{ m.content }}{% set x = 1 %}\n"
    "{%- endgeneration -%}\n{{ x is defined }}\n{% else %}{{ m.role }}{% endif %}{% endfor %}",
    "raw_and_escapes": "{% raw %}{{ no }}{% endraw %}{{ '\\n' | length }}{{ \"\\u00e9\\t\" }}",
    "plus_of_undefined": "{{ 'a' + nothing }}",
    "attribute_of_undefined": "{{ nothing.content }}",
    "missing_attribute": "[{{ messages[0].nothing }}]",
    "index_out_of_range": "[{{ messages[9] }}]",
    "raise_exception": "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}",
    "syntax_error": "{% if %}",
    "unknown_filter": "{{ 'a' | nothing }}",
    "mutation": "{{ messages.append(1) }}",
    "private_attribute": "{{ ''.__class__ }}",
    "newlines_in_strings": "{{ 'a\nb' }}{{ '<|x|>' + '\n' }}",
    "recursion": "{% macro f(n) %}{{ n }}{% if n > 0 %}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(20) }}",
    "range": "{% for i in range(3) %}{{ i }}{% endfor %}{% for i in range(5, 0, -2) %}{{ i }}{% endfor %}",
}


def render(template, tools):
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    try:
        return _compile_jinja_template(template).render(
            messages=MESSAGES, tools=tools, documents=None, add_generation_prompt=True, **names
        )
    except Exception:
        return None


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    cases = []
    for name, template in TEMPLATES.items():
        with_tools = "tools[" in template or "tools |" in template
        text = render(template, TOOLS if with_tools else None)
        cases.append({"name": name, "template": template, "with_tools": with_tools, "text": text})
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        json.dump({"messages": MESSAGES, "tools": TOOLS, "cases": cases}, file, ensure_ascii=False, indent=1)
        file.write("\n")
