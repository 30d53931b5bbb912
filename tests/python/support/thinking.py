"""Chat templates of reasoning models for tiny checkpoints: what they leave out of the past, and a
switch that keeps it."""

from __future__ import annotations

import json
from pathlib import Path

# Qwen3.5's: past reasoning and the header of past reasoning go, texts are trimmed.
TEMPLATE = """\
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
  {%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
  {%- set content = message.content|trim %}
  {%- if message.role == 'assistant' %}
    {%- set thought = '' %}
    {%- if '</think>' in content %}
      {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
      {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {%- if KEEPS loop.index0 > ns.last %}
      {{- '<|im_start|>assistant\\n<think>\\n' + thought|trim + '\\n</think>\\n\\n' + content }}
    {%- else %}
      {{- '<|im_start|>assistant\\n' + content }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
  {%- else %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|im_start|>assistant\\n<think>\\n' }}
  {%- if enable_thinking is defined and enable_thinking is false %}
    {{- '\\n</think>\\n\\n' }}
  {%- endif %}
{%- endif %}
"""


def thinking(*, keeps: bool = False) -> str:
    """Returns the template; with `keeps`, one that reads `preserve_thinking` and trims nothing."""
    if not keeps:
        return TEMPLATE.replace("KEEPS ", "")
    switch = "preserve_thinking is defined and preserve_thinking or "
    return TEMPLATE.replace("KEEPS ", switch).replace("message.content|trim", "message.content")


def set_template(folder: Path, template: str) -> None:
    """Gives a checkpoint another chat template."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "chat_template": template}))
