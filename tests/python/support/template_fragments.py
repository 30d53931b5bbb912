"""Fragments of chat templates and what transformers renders of them.

The record, tests/rust/template_fragments.json, is compared with the daemon's renderer by
`cargo test --test rust fragments` and with transformers by tests/python/parity/test_templates.py.
After a change of the list:

    $(tests/python/venv.sh test) tests/python/support/template_fragments.py
"""

from __future__ import annotations

import json
from pathlib import Path

from transformers.utils.chat_template_utils import _compile_jinja_template

RECORD = Path(__file__).resolve().parents[2] / "rust" / "template_fragments.json"

CALL = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Paris", "days": 2, "raw": None}},
}
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  What's the weather?\n"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"t": 21.5}', "name": "weather", "tool_call_id": "call00001"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nIt's 21.5 °C."},
    {"role": "user", "content": "Thanks"},
]
# Known and left: `callable`, `xmlattr`, `random`, `pprint`, `{!r}`, `\\N{…}`, a macro's varargs and kwargs
# fail; `attr` reads items, and `~` writes 1e22 and 1e-7 without an exponent.
VARIABLES = {
    "s": "Hello, World",
    "t": "  padded \n",
    "u": "naïve Straße ÉCOLE",
    "empty": "",
    "digits": "1234",
    "csv": "a,b,,c",
    "lines": "one\ntwo\r\nthree\n\nfour\n",
    "html": "<a href='x'>&\"</a>",
    "n": 7,
    "neg": -7,
    "f": 2.5,
    "whole": 3.0,
    "tiny": 1e-7,
    "huge": 1e22,
    "zero": 0,
    "yes": True,
    "no": False,
    "nil": None,
    "l": [3, 1, 2],
    "ls": ["b", "a", "C"],
    "nested": [[1, [2]], ["x", None]],
    "d": {"b": 1, "a": [True, None], "c": {"k": "v"}},
    "objs": [
        {"name": "x", "n": 2, "tags": ["p", "q"]},
        {"name": "Y", "n": 1, "tags": []},
        {"name": "x", "n": 3, "tags": ["p"]},
    ],
    "schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": 'A "city"\nor town'}},
        "required": ["city"],
    },
}

FRAGMENTS = r"""
{{ "%s and %s" % (s, n) }}
{{ "%s" % s }}
{{ '%d%%' % n }}
{{ '%5d|%-5d|%05d' % (n, n, n) }}
{{ '%.2f' % f }}
{{ '%x %X %o %e' % (255, 255, 8, f) }}
{{ '%r' % s }}
{{ '%s' % l }}
{{ '%s %s' % (yes, nil) }}
{{ '%(a)s-%(b)d' % {'a': s, 'b': n} }}
{{ ('%s' % n) ~ '!' }}
{{ '[%s]' % s | upper }}
{{ '[%s]' % (s | upper) }}
{{ 'a' + '%s' % n + 'b' }}
{% set fmt = '<%s>' %}{{ fmt % s }}
{% set fmt = '<%s:%s>' %}{{ fmt % (s, n) }}
{{ '%s' % ('a' if yes else 'b') }}
{{ '%s' % d.c.k }}
{{ '%s' % objs[0]['name'] }}
{{ '%s=%s;' % ('k', 'v') * 2 }}
{% if n % 2 == 1 %}odd{% endif %}
{{ n % 4 }} {{ neg % 4 }} {{ f % 2 }} {{ -n % 4 }} {{ neg % -4 }}
{{ (n + 1) % 3 }}{{ n * 2 % 5 }}{{ n % 5 * 2 }}{{ 100 % 7 % 4 }}
{% for i in range(4) %}{{ 'x' if i % 2 == 0 else 'y' }}{% endfor %}
{{ '%s' % '%d' % 3 if no else '%%' }}
{{ '%c' % 'x' }}
{{ '%+d % d' % (n, n) }}
{{ '%10s|%-10s|%.3s' % (s, s, s) }}
{{ "50%" }}{{ '100 % sure' }}
{%- if (loop_index or 3) % 2 -%}odd{%- endif -%}
{{ "%s" | format(s) }}
{{ "%s %d" | format(s, n) }}
{{ "%(x)s" | format(x=n) }}
{{ "{} {}".format(s, n) }}
{{ "{0}{1}{0}".format('a', 'b') }}
{{ "{name}!".format(name=s) }}
{{ "{:>8}|{:<8}|{:^8}".format('a', 'b', 'c') }}
{{ "{:.1f} {:05d} {:,}".format(f, n, 1234567) }}
{{ "{a[0]}".format(a=l) }}
{{ s.split(', ') }}
{{ csv.split(',') }} {{ csv.split(',', 1) }} {{ csv.split(',', maxsplit=1) }} {{ csv.split(sep=',') }}
{{ t.split() }} {{ 'a b  c'.split(' ') }} {{ 'a b c'.split(None, 1) }}
{{ csv.rsplit(',', 1) }} {{ csv.rsplit(',') }} {{ 'a b c'.rsplit(None, 1) }} {{ csv.rsplit(',', maxsplit=1)[0] }}
{{ s.partition(', ') }} {{ s.rpartition('o') }} {{ s.partition('zz') }} {{ s.rpartition('zz') }}
{{ s.removeprefix('Hello') }}|{{ s.removesuffix('World') }}|{{ s.removeprefix('x') }}
{{ s.find('o') }} {{ s.rfind('o') }} {{ s.find('o', 5) }} {{ s.find('zz') }} {{ s.rfind('o', 0, 5) }}
{{ s.index('o') }} {{ s.rindex('o') }} {{ s.index('o', 5) }}
{{ s.count('l') }} {{ s.count('l', 5) }} {{ 'aaa'.count('') }}
{{ s.startswith('Hello') }} {{ s.startswith(('x', 'He')) }} {{ s.startswith('World', 7) }}
{{ s.endswith('World') }} {{ s.endswith(('x', 'ld')) }} {{ s.endswith('Hello', 0, 5) }}
{{ s.replace('l', 'L') }} {{ s.replace('l', 'L', 1) }} {{ 'abc'.replace('', '-') }}
{{ t.strip() }}|{{ t.lstrip() }}|{{ t.rstrip() }}|{{ t.strip(none) }}|{{ 'xxaxx'.strip('x') }}
{{ 'xyaxy'.lstrip('xy') }} {{ 'xyaxy'.rstrip('yx') }}
{{ u.upper() }} {{ u.lower() }} {{ u.casefold() }} {{ u.swapcase() }} {{ u.title() }} {{ u.capitalize() }}
{{ "they're bill's".title() }} {{ 'hELLO wORLD'.capitalize() }}
{{ lines.splitlines() }}
{{ lines.splitlines(true) }} {{ lines.splitlines(keepends=True) }} {{ ''.splitlines() }} {{ '\n'.splitlines() }}
{{ 'a\x0bb\x0cc\x1cd\x85e'.splitlines() }}
{{ '42'.zfill(5) }} {{ '-42'.zfill(5) }} {{ '+1'.zfill(1) }}
{{ 'ab'.ljust(5) }}|{{ 'ab'.rjust(5) }}|{{ 'ab'.center(5) }}|{{ 'ab'.ljust(5, '.') }}|{{ 'abc'.center(6, '*') }}
{{ 'a\tb'.expandtabs() }}|{{ 'a\tb'.expandtabs(4) }}
{{ ','.join(ls) }} {{ ''.join([]) }} {{ '-'.join('abc') }}
{{ digits.isdigit() }} {{ s.isdigit() }} {{ ''.isdigit() }} {{ digits.isnumeric() }} {{ digits.isdecimal() }}
{{ s.isalpha() }} {{ 'abc'.isalpha() }} {{ 'ab1'.isalnum() }} {{ ' '.isspace() }} {{ ''.isspace() }}
{{ 'abc'.islower() }} {{ 'ABC'.isupper() }} {{ 'Abc'.istitle() }} {{ 'a_1'.isidentifier() }} {{ '1a'.isidentifier() }}
{{ 'abc'.isascii() }} {{ u.isascii() }} {{ 'a b'.isprintable() }} {{ 'a\n'.isprintable() }}
{{ '{a}'.format_map({'a': 1}) }}
{{ s[0] }}{{ s[-1] }}{{ s[1:4] }}{{ s[::-1] }}{{ s[:-7] }}{{ s[7:] }}{{ s[::2] }}
{{ d.get('b') }} {{ d.get('zz') }} {{ d.get('zz', 'def') }} {{ d.get('zz', none) }}
{{ d.keys() | list }} {{ d.values() | list }} {{ d.items() | list }}
{% for k in d %}{{ k }},{% endfor %}{% for k, v in d.items() %}{{ k }}={{ v }};{% endfor %}
{% for k, v in d | items %}{{ k }}={{ v }};{% endfor %}
{% for k, v in d | dictsort %}{{ k }}={{ v }};{% endfor %}
{% for k, v in d.c | dictsort(by='value', reverse=true) %}{{ k }}={{ v }};{% endfor %}
{{ d.copy() }} {{ d | length }} {{ 'b' in d }} {{ 'zz' not in d }}
{{ d['c']['k'] }} {{ d.c.k }} {{ d['c'].k }} {{ d.missing is defined }} {{ d['missing'] is undefined }}
{{ d }} {{ l }} {{ nested }} {{ objs[1] }}
{{ l.index(1) }} {{ l.count(3) }} {{ l.copy() }} {{ (1, 2, 1).count(1) }} {{ (1, 2).index(2) }}
{{ l[0] }} {{ l[-1] }} {{ l[1:] }} {{ l[:-1] }} {{ l[::-1] }} {{ l[5:] }} {{ l[1:][0] }} {{ (l[1:]).index(2) }}
{{ l + [4] }} {{ [0] + l + [4] }} {{ (l + [9])[-1] }} {{ (1,) + (2,) }} {{ l * 2 }} {{ [none] * 2 }}
{{ l | sum }} {{ l | max }} {{ l | min }} {{ l | sort }} {{ l | sort(reverse=true) }} {{ l | reverse | list }}
{{ l | first }} {{ l | last }} {{ l | length }} {{ l | count }} {{ ls | join }} {{ ls | join(', ') }}
{{ ls | sort }} {{ ls | sort(case_sensitive=true) }} {{ ls | unique | list }} {{ [1, 1, 2] | unique | list }}
{{ ['a', 'A'] | unique | list }} {{ ['a', 'A'] | unique(case_sensitive=true) | list }}
{{ objs | map(attribute='name') | list }} {{ objs | map(attribute='zz', default='-') | list }}
{{ objs | map(attribute='tags.0', default='-') | join(',') }}
{{ ls | map('upper') | list }} {{ ls | map('replace', 'a', 'z') | join }}
{{ l | map('string') | join('+') }} {{ l | select('odd') | list }} {{ l | reject('odd') | list }}
{{ l | select('gt', 1) | list }} {{ l | select('>', 1) | list }} {{ [0, 1, '', 'a', none] | select | list }}
{{ objs | selectattr('tags') | map(attribute='n') | list }}
{{ objs | selectattr('name', 'equalto', 'x') | list | length }} {{ objs | selectattr('n', 'ge', 2) | list | length }}
{{ objs | rejectattr('name', 'eq', 'x') | list }} {{ objs | selectattr('zz', 'defined') | list }}
{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | map('trim') | list }}
{{ messages | selectattr('role', 'in', ['user', 'tool']) | list | length }}
{{ (messages | rejectattr('role', '==', 'system') | list)[0].role }}
{% for g in objs | groupby('name') %}{{ g.grouper }}:{{ g.list | length }} {% endfor %}
{% for name, items in objs | groupby('name', case_sensitive=true) %}{{ name }}{{ items | length }} {% endfor %}
{{ objs | sum(attribute='n') }} {{ objs | sort(attribute='n') | map(attribute='n') | list }} {{ objs | max(attribute='n') }}
{{ objs | sort(attribute='name,n') | map(attribute='n') | list }}
{{ [1, 2, 3, 4, 5] | batch(2) | list }} {{ [1, 2, 3] | batch(2, 'x') | list }} {{ [1, 2, 3, 4, 5] | slice(2) | list }}
{{ t | trim }}| {{ 'xxaxx' | trim('x') }} {{ u | upper }} {{ u | lower }} {{ u | title }} {{ 'hELLO' | capitalize }}
{{ s | replace('l', 'L') }} {{ s | replace('l', 'L', 1) }} {{ n | replace('7', '8') }} {{ s | length }} {{ s | reverse }}
{{ 'a-b c_d e.f' | title }} {{ "it's o'neil (x) [y]" | title }}
{{ 'one\ntwo\n\nthree' | indent }}|{{ 'one\ntwo' | indent(2, true) }}|{{ 'a\n\nb' | indent(2, blank=true) }}|{{ 'a\nb' | indent('> ') }}
{{ 'foo' | center(9) }}|{{ 'foo bar baz' | wordcount }}|{{ 'foo bar baz qux' | truncate(9) }}|{{ 'foo bar baz qux' | truncate(9, true) }}
{{ 'foo bar baz' | truncate(7, true, '', 0) }}|{{ 'foo bar' | truncate(255) }}|{{ 'foo bar baz' | truncate(5, end='…', leeway=0) }}
{{ 'foo bar baz' | wordwrap(7) }}
{{ html | e }} {{ html | escape }} {{ html | forceescape }} {{ html | striptags }} {{ html | safe }}
{{ 'a b/c?d=é&f' | urlencode }} {{ {'a': 1, 'b c': 'd'} | urlencode }}
{{ 1000 | filesizeformat }} {{ 1 | filesizeformat }} {{ 1048576 | filesizeformat(true) }}
{{ '42' | int }} {{ 'x' | int }} {{ 'x' | int(5) }} {{ '0x1f' | int(base=16) }} {{ 3.9 | int }} {{ '3.9' | int }}
{{ '1.5' | float }} {{ 'x' | float }} {{ 'x' | float(2.0) }} {{ n | float }} {{ '1e3' | float }}
{{ 2.567 | round }} {{ 2.567 | round(1) }} {{ 2.567 | round(2, 'floor') }} {{ 2.1 | round(method='ceil') }} {{ 2.5 | round }} {{ 7 | round }}
{{ -3 | abs }} {{ neg | abs }} {{ f | abs }} {{ f | string }} {{ yes | string }} {{ nil | string }} {{ l | string }}
{{ nil | default('d') }} {{ nil | default('d', true) }} {{ missing | default('d') }} {{ missing | d('x') }} {{ '' | default('e', boolean=true) }} {{ missing.a | default('y') if no else 'z' }}
{{ 'abc' | list }} {{ d | list }} {{ (1, 2) | list }} {{ range(3) | list }} {{ 'abc' | first }} {{ 'abc' | last }}
{{ d | tojson }} {{ s | tojson }} {{ nil | tojson }} {{ yes | tojson }} {{ f | tojson }} {{ whole | tojson }} {{ u | tojson }}
{{ d | tojson(indent=2) }}
{{ schema | tojson(indent=4) }}
{{ schema | tojson(ensure_ascii=True, sort_keys=True) }} {{ u | tojson(ensure_ascii=true) }}
{{ l | tojson(indent=none) }} {{ {'a': (1, 2)} | tojson }} {{ {1: 'a', true: 'b', none: 'c', 2.5: 'd'} | tojson }}
{{ d | tojson(separators=(',', ':')) }} {{ [] | tojson(indent=2) }} {{ {} | tojson(indent=2) }} {{ [[]] | tojson(indent=1) }}
{{ l[1:] | tojson }} {{ d.items() | list | tojson }} {{ objs | map(attribute='n') | list | tojson }}
{{ html | tojson }} {{ '\u2028\x7f\x00' | tojson }}
{{ [huge, tiny, whole, f, 1e16, 123456789012345680.0, 1e-5, 0.0001] }} {{ huge }} {{ tiny }} {{ whole }}
{{ n / 2 }} {{ n // 2 }} {{ neg // 2 }} {{ 6 / 3 }} {{ 2 ** 10 }} {{ 2 ** -1 }} {{ 2 ** 3 ** 2 }} {{ f // 1 }} {{ -2 ** 2 }}
{{ +n }} {{ -n }} {{ - -n }} {{ +f }} {{ 1 - -1 }} {{ 1 + +1 }}
{{ 1 == 1.0 }} {{ yes == 1 }} {{ '1' == 1 }} {{ nil == no }} {{ l == [3, 1, 2] }} {{ (1, 2) == [1, 2] }} {{ 'a' < 'b' }} {{ [1, 2] < [1, 3] }}
{{ 1 < 2 < 3 }} {{ 1 < 3 < 2 }} {{ 'a' in 'abc' }} {{ 'z' not in 'abc' }} {{ 3 in l }} {{ not yes }} {{ not (1 in l) }}
{{ yes and 'x' }} {{ no and 'x' }} {{ no or 'y' }} {{ '' or nil or 'z' }} {{ l and d and 1 }} {{ 0 or [] }}
{{ 'a' if yes }}|{{ 'a' if no }}|{{ 'a' if no else 'b' }}|{{ 'a' if no else 'b' if no else 'c' }}
{{ yes ~ no ~ nil ~ n ~ f ~ l ~ d.c ~ whole }} {{ 'a' ~ (1 + 2) }} {{ 'a' ~ 1 + 'b' }} {{ 1 ~ 2 }} {{ f ~ '' }} {{ whole ~ '' }}
{{ 'a' 'b' "c" }} {{ 'tab\there' }} {{ 'nl\nx' }} {{ 'q\'q' }} {{ "d\"d" }} {{ '\\' }} {{ '\x41\u00e9' }} {{ '\101' }} {{ '\d' }}
{{ '\U0001F600' }} {{ '\a\v' | tojson }} {{ '\/' }}
{{ 1_000 }} {{ 0x1f }} {{ 0b101 }} {{ 0o17 }} {{ 1e3 }} {{ 1.5e-3 }} {{ 12345678901234567890 }}
{{ [1, 'a', none, true, 2.0, (1,), {'k': [1]}] }} {{ ('x', ) }} {{ () }} {{ (1, 2) }} {{ [] }} {{ {} }} {{ [1,] }} {{ {'a': 1,} }}
{{ ["it's", 'q"', "b'\"", 'n\nt\t', '\\', 'é', '\x07', '\u200b', '\xa0', '\U0001F600', '\ue000'] }}
{{ true }} {{ True }} {{ false }} {{ False }} {{ none }} {{ None }} {{ missing }}
{{ l.0 }} {{ nested.0.1.0 }} {{ objs[0].tags[1] }} {{ d.a[0] }} {{ 'abc'[1] }} {{ (1, 2)[1] }} {{ {'a': 1}['a'] }} {{ {'a': 1}.a }}
{{ n is odd }} {{ n is even }} {{ n is divisibleby 7 }} {{ n is divisibleby(2) }} {{ n is number }} {{ n is integer }} {{ f is float }} {{ yes is boolean }}
{{ yes is number }} {{ yes is integer }} {{ f is integer }} {{ n is float }} {{ 'x' is number }} {{ nil is number }}
{{ s is string }} {{ l is string }} {{ l is sequence }} {{ d is mapping }} {{ l is mapping }} {{ s is sequence }} {{ s is iterable }} {{ n is iterable }} {{ nil is none }} {{ nil is not none }}
{{ d is sequence }} {{ d is iterable }} {{ missing is defined }} {{ missing is undefined }} {{ missing is none }} {{ missing is iterable }} {{ missing is string }} {{ n is sequence }}
{{ yes is true }} {{ 1 is true }} {{ no is false }} {{ 0 is false }} {{ nil is false }} {{ 1 is eq 1 }} {{ 1 is ne 2 }} {{ 1 is lt 2 }} {{ 2 is gt 1 }} {{ 1 is in [1] }} {{ 1 is sameas 1 }} {{ nil is sameas nil }}
{{ 'abc' is lower }} {{ 'ABC' is upper }} {{ 'upper' is filter }} {{ 'odd' is test }} {{ html is escaped }}
{{ missing | length }} {{ missing | list }} {{ missing | join(',') }} {{ missing | trim }}|{{ missing ~ 'x' }} {{ 'x' in missing }} {{ missing == missing }} {{ missing | upper }}|
{% for x in missing %}{{ x }}{% else %}none{% endfor %}{% if missing %}a{% else %}b{% endif %}{{ not missing }}
{% for x in l %}{{ loop.index }}/{{ loop.length }}{{ loop.first }}{{ loop.last }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.index0 }} {% endfor %}
{% for x in l %}{{ loop.previtem }}<{{ x }}>{{ loop.nextitem }} {% endfor %}{% for x in l %}{{ loop.previtem is defined }}{% endfor %}
{% for x in [1, 1, 2] %}{{ loop.changed(x) }}{% endfor %} {% for x in l %}{{ loop.cycle('a', 'b') }}{% endfor %} {% for x in l %}{{ loop.depth }}{{ loop.depth0 }}{% endfor %}
{% for x in l if x > 1 %}{{ loop.index }}{{ x }}{% endfor %}{% for x in [] %}{% else %}empty{% endfor %}
{% for a, b in [(1, 2), (3, 4)] %}{{ a }}{{ b }}{% endfor %}{% for (a, b), c in [((1, 2), 3)] %}{{ a }}{{ b }}{{ c }}{% endfor %}
{% for x in l %}{% if x == 1 %}{% continue %}{% endif %}{{ x }}{% endfor %}{% for x in l %}{% if x == 1 %}{% break %}{% endif %}{{ x }}{% endfor %}
{% for x in nested recursive %}{% if x is iterable and x is not string %}[{{ loop(x) }}]{% else %}{{ x }}{% endif %}{% endfor %}
{% for c in 'ab' %}{{ c }}-{% endfor %}{% for x in l | sort | reverse %}{{ x }}{% endfor %}{% for i in range(2, 8, 3) %}{{ i }}{% endfor %}{% for i in range(3, 0, -1) %}{{ i }}{% endfor %}
{% for m in messages[1:] %}{{ loop.index }}{{ m.role[0] }}{% endfor %}{% for m in messages[:-1] %}{{ m['role'][0] }}{% endfor %}{{ messages[-1].role }}
{% for m in messages | reverse %}{{ m.role[0] }}{% endfor %} {{ messages | length }} {{ messages[0]['content'] }}
{% set x = 1 %}{% for i in l %}{% set x = x + i %}{% endfor %}{{ x }}{% if yes %}{% set x = 9 %}{% endif %}{{ x }}
{% set ns = namespace(a=1, b=[]) %}{% set ns.a = ns.a + 1 %}{% set ns.b = ns.b + [3] %}{{ ns.a }}{{ ns.b }}{% set ns.c = 'new' %}{{ ns.c }}{{ ns.zz is defined }}
{% set ns = namespace({'a': 1}) %}{{ ns.a }}{% set ns = namespace() %}{% set ns.x = 1 %}{{ ns.x }}
{% set a, b = 1, 2 %}{{ a }}{{ b }}{% set c = 1, 2 %}{{ c }}{% set (e, g) = (3, 4) %}{{ e }}{{ g }}{% set x = 1 if no else 2 %}{{ x }}
{% set block %}a {{ n }} b{% endset %}{{ block }}{{ block | length }}{% set up | upper %}abc{% endset %}{{ up }}
{% macro m(a, b='x') %}[{{ a }}{{ b }}]{% endmacro %}{{ m(1) }}{{ m(1, 2) }}{{ m(b=3, a=4) }}{{ m() }}{{ m.name }}{{ m(1) | upper }}
{% macro m(x) %}{{ caller(x) }}{% endmacro %}{% call(y) m(5) %}<{{ y }}>{% endcall %}{% macro w() %}({{ caller() }}){% endmacro %}{% call w() %}in{% endcall %}
{% macro m() %}{{ later }}{% endmacro %}{% set later = 'seen' %}{{ m() }}
{% macro m() %}{{ n }}{{ messages | length }}{% endmacro %}{{ m() }}{% macro r(x) %}{{ x }}{% if x > 0 %}{{ r(x - 1) }}{% endif %}{% endmacro %}{{ r(3) }}
{% macro m(x) -%}  {{ x }}  {%- endmacro %}[{{ m(1) }}]{% macro d2(x, y=n) %}{{ y }}{% endmacro %}{{ d2(1) }}
{% with a = 1, b = 2 %}{{ a }}{{ b }}{% endwith %}{{ a is defined }}{% filter upper %}abc{{ s }}{% endfilter %}
{% raw %}{{ x }}{% if %}{% endraw %}{# comment {{ x }} #}{#- c -#} x {#- c #}
   {%- if yes %}  a  {%- endif %}   b
   {% if yes %}a{% endif %}
   {%+ if yes %}a{%+ endif %}
x
{{- ' a ' -}}  {{- 'b' }}
{% if no %}{% elif yes %}e{% else %}x{% endif %}{% if not no and (yes or no) %}t{% endif %}
{% block b %}in{% endblock %}{{ self.b() }}
{{ range(5)[1:3] | list }} {{ range(1, 3) | length }} {{ dict(a=1, b='x') }} {{ dict({'a': 1}, b=2) }}
{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.next() }}{% set j = joiner(', ') %}{{ j() }}x{{ j() }}y
{{ messages[2].tool_calls[0].function.arguments | tojson }} {{ messages[2].tool_calls[0]['function']['name'] }}
{{ messages[2].tool_calls[0].function.arguments }}
{% for k, v in messages[2].tool_calls[0].function.arguments.items() %}{{ k }}: {{ v if v is string else v | tojson }};{% endfor %}
{% for k, v in messages[2].tool_calls[0].function.arguments | items %}<{{ k }}>{{ v | tojson | safe if v is not string else v | string }}</{{ k }}>{% endfor %}
{% set content = messages[4].content %}{% if '</think>' in content %}{{ content.split('</think>')[-1].lstrip('\n') }}|{{ content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') }}{% endif %}
{% set ns = namespace(found=false) %}{% for m in messages[::-1] %}{% set index = (messages | length - 1) - loop.index0 %}{% if not ns.found and m.role == 'user' %}{% set ns.found = true %}{{ index }}{% endif %}{% endfor %}
{%- for m in messages -%}{{- '<|' + m['role'] + '|>' -}}{{ m['content'] | trim }}{%- if not loop.last %}{{ '\n' }}{% endif %}{%- endfor -%}
{{ messages | map(attribute='role') | unique | join('/') }} {{ messages | map(attribute='content') | map('length') | sum }}
{% if tools is not none and tools | length > 0 %}{{ tools | tojson }}{% else %}no tools{% endif %} {{ tools is defined }} {{ tools }} {{ documents }} {{ add_generation_prompt }}
{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}{{ system }}{{ rest | length }}
{% if (messages[0].role == 'user') != (0 % 2 == 0) %}{{ 'alternate' }}{% endif %}
{% if messages[1].content is string %}s{% else %}{% for c in messages[1].content %}{{ c.text }}{% endfor %}{% endif %}{{ messages[1].content is mapping }}
{{ messages[0] | tojson }} {{ messages[3].content | fromjson if no else 'x' }}
{{ messages[2].tool_calls is defined and messages[2].tool_calls }}
{{ messages[2].tool_calls and messages[2].tool_calls | length }} {{ messages[0].tool_calls is defined }} {{ messages[0].get('tool_calls') }} {{ messages[0].get('tool_calls', []) | length }}
{{ schema.properties.city.description }} {{ schema.required | join(', ') }} {{ schema.properties.keys() | list | join }} {{ 'city' in schema.required }} {{ schema.get('required') }}
{% for name, p in schema.properties.items() %}{{ name }}: {{ p.type }}{{ '?' if name not in schema.required else '' }}{% endfor %}{{ schema['properties'].items() | list | length }}
{%- macro render(spec) -%}{%- if spec.type == 'object' -%}{ {%- for k, v in spec.properties.items() -%}{{ k }}: {{ render(v) }}{%- endfor -%} }{%- else -%}{{ spec.type }}{%- endif -%}{%- endmacro -%}{{ render(schema) }}
{{ schema | tojson | replace('"', "'") }} {{ schema | string }}
{{ strftime_now is defined }} {{ raise_exception is defined }} {{ strftime_now('%Y') | length }}
{{ (messages | selectattr('role', 'equalto', 'system') | list | first).content }} {{ (messages | selectattr('role', 'equalto', 'zz') | first) is defined }}
{{ [1, [2, 3]] | tojson }} {{ [[1, 2], [3]] | sum(start=[]) }} {{ 'a,b' | replace(',', ';') | upper }}
{{ ([1, 2] | map('string') | list) + ['x'] }} {{ (1, 2) | join('-') }} {{ {'a': 1} | tojson ~ 'x' }} {{ l | join(', ') | length }}
{{ 'yes' if l is iterable and (l is not string and l is not mapping) else 'no' }} {{ l | first in l }}
{{ s | e | length }} {{ [s, n] | join('|') }} {{ n | string | length }} {{ n ~ '' == '7' }} {{ '7' | int == n }} {{ n | float == 7.0 }}
{{ d | dictsort | tojson }} {{ d | items | list | length }} {{ {'b': 1, 'a': 2} | dictsort(false, 'value') }} {{ d | tojson | length }}
{{ {'a': none}.a is none }} {{ {'a': none}.get('a', 'x') }} {{ {'get': 1}['get'] }} {{ {'items': [1]}['items'] }} {{ {'x': {}}.x | length }}
{{ '' is string }} {{ s is not mapping }} {{ s | lower | title | trim | replace('World', 'X') }}
{{ none is none }} {{ none == none }} {{ none in [none] }} {{ [none, 1] | tojson }} {{ nil | string ~ 'x' }} {{ nil or '' }}
{{ l | map('multiply', 2) | list if no else l | map('string') | list }} {{ ls | map('first') | list }} {{ ls | map(attribute=0) | list }}
{{ objs | groupby(attribute='n') | map(attribute='0') | list }} {{ objs | map(attribute='tags') | map('length') | list }} {{ objs | selectattr('tags', 'ne', []) | list | count }}
{{ 5 | int is integer }} {{ (5).bit_length() }} {{ (2.0).is_integer() }} {{ '5' is integer }} {{ 10 | string | int + 1 }}
{{ 'abc'.upper().lower().title() }} {{ ('a' ~ 'b').upper() }} {{ ['x', 'y'][0].upper() }} {{ s.lower().split(', ')[1].upper() }} {{ (s ~ '!')[-1] }}
{{ l is defined and l | length == 3 }} {{ (l | length) == 3 }} {{ l | length - 1 }} {{ -l | length if no else 1 }} {{ l[l | length - 1] }} {{ l[-1:] }} {{ l[(n - 7):] }}
"""

FRAGMENTS = [
    # A line is a fragment, but for those that show what happens at the ends of lines.
    line
    for line in FRAGMENTS.strip("\n").split("\n")
] + [
    "a\n{% if yes %}\nb\n{% endif %}\nc\n",
    "a\n  {% if yes %}\n  b\n  {% endif %}  \nc\n\n",
    "  {{ n }}  \n  {# c #}\n  x\n",
    "{% for x in l %}\n{{ x }}\n{% endfor %}\n",
    "{% for x in l -%}\n  {{ x }}\n{%- endfor %}\n",
    "{%- set x = 1 -%}\n\n  {{ x }}\n  {%- set y = 2 %}\n{{ y }}",
    "a {%- if yes -%} b {%- endif -%} c",
    "a\r\n{% if yes %}\r\nb\r\n{% endif %}\r\nc",
    "\n\n{{ n }}\n\n\n",
    "{%+ if yes %}\n  a\n  {%+ endif %}\nb",
    "{% set x %}\n  a\n{% endset %}\n[{{ x }}]",
    "{{ [\n  1,\n  2\n] }}{{ {\n 'a': 1\n}['a'] }}",
    "{% macro m(x) %}\n  {{ x }}\n{% endmacro %}\n{{ m(1) }}|",
    "{% generation %}a{% endgeneration %}b",
    "{%- generation -%}\n a \n{%- endgeneration -%}\nb",
    "{{ 'multi\nline' }}",
    "{% raw %}\n{{ a }}\n{% endraw %}\nb",
    "{{ n }}\n{{ n }}{# x #}\n{{ n }}",
    "{% if yes %}{{ 'a' }}\n{%- endif %}\n\nb",
]


def render(source: str) -> str | None:
    """Returns what transformers renders; None where it fails."""
    try:
        template = _compile_jinja_template(source)
        return template.render(
            messages=MESSAGES, tools=None, documents=None, add_generation_prompt=False, **VARIABLES
        )
    except Exception:  # whatever Jinja or Python call it
        return None


def record() -> dict:
    """Returns what the record should hold."""
    fragments = [{"source": source, "text": render(source)} for source in FRAGMENTS]
    return {"messages": MESSAGES, "variables": VARIABLES, "fragments": fragments}


def dumps(recorded: dict) -> str:
    """Returns the record's text, a fragment a line."""
    lines = [json.dumps(entry, ensure_ascii=False) for entry in recorded["fragments"]]
    head = {name: recorded[name] for name in ("messages", "variables")}
    body = json.dumps(head, ensure_ascii=False)[:-1]
    return body + ', "fragments": [\n' + ",\n".join(lines) + "\n]}\n"


def main() -> None:
    recorded = record()
    RECORD.write_text(dumps(recorded), encoding="utf-8")
    failed = [entry["source"] for entry in recorded["fragments"] if entry["text"] is None]
    print(f"{len(recorded['fragments'])} fragments; transformers refuses {len(failed)}:")
    print("\n".join(failed))


if __name__ == "__main__":
    main()
