"""Chat templates in the shapes of six model families, and small local tokenizer folders that hold them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

# Qwen2.5: ChatML, a default system turn, tools written with tojson into the system turn.
QWEN2_5 = r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' }}
    {%- endif %}
    {{- "\n\n# Tools\n\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools><|im_end|>\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first)
        or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\n<tool_call>\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
# Llama 3.1: BOS and a system turn with the date, always; CLOCK is Llama 3.2's, which asks the clock first.
_LLAMA3 = r"""{{- bos_token }}
DATE
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Cutting Knowledge Date: December 2023\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{%- if tools is not none %}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\n\n" }}{%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.role not in ['user', 'assistant', 'tool'] %}{{- raise_exception("Unknown role") }}{%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
LLAMA3_1 = _LLAMA3.replace(
    "DATE", '{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}'
)
LLAMA3_2 = _LLAMA3.replace(
    "DATE",
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    '{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}'
    "{%- endif %}",
)
# GLM-4: a prefix in front of the first turn, and a generation block around what the assistant says.
GLM4 = """[gMASK]<sop>
{%- if tools %}<|system|>
# Tools
{% for tool in tools %}{{ tool|tojson(ensure_ascii=False) }}
{% endfor %}{% endif %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}<|assistant|>
{% generation %}{{ m.content }}{% endgeneration %}
{%- else %}<|{{ m.role }}|>
{{ m.content }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>
{% endif %}"""
# Mistral: users and assistants take turns, a reply ends with EOS, and tools stand before the last user turn.
MISTRAL = """{{ bos_token }}
{%- for m in messages %}
{%- if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]
{%- elif m.role == 'user' %}
{%- if tools is not none and loop.last %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}[INST]
{{- ' ' + m.content }}[/INST]
{%- elif m.role == 'assistant' and m.tool_calls %}[TOOL_CALLS]{{ m.tool_calls | tojson }}{{ eos_token }}
{%- elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}
{%- elif m.role == 'tool' %}[TOOL_RESULTS]{{ {"content": m.content} | tojson }}[/TOOL_RESULTS]
{%- else %}{{ raise_exception('Only user, system, assistant and tool roles are supported.') }}
{%- endif %}
{%- endfor %}"""
# gpt-oss: another form of date, namespaces, loop controls, and replies that are closed differently when they are last.
HARMONY = """<|im_start|>system
Current date: {{ strftime_now("%Y-%m-%d") }}
{%- set seen = namespace(users=0) %}
{%- for tool in tools or [] %}
type {{ tool.function.name }} = (_: {{ tool.function.parameters | default({}) | tojson }}) => any;
{%- endfor %}<|im_end|>
{%- for m in messages %}
{%- if m.role == 'system' and not loop.first %}{% continue %}{% endif %}
{%- if m.role == 'user' %}{% set seen.users = seen.users + 1 %}{% endif -%}
<|im_start|>{{ m.role }} {{ seen.users }}
{{ m.content }}{{ '<|eot_id|>' if loop.last and m.role == 'assistant' else '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant{% endif %}"""
NAMED = [
    {"name": "default", "template": "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}<|im_start|>"},
    {"name": "tool_use", "template": "{{ tools | tojson }}{% for m in messages %}{{ m.content }}{% endfor %}"},
]
TEMPLATES: dict[str, Any] = {
    "qwen2.5": QWEN2_5, "llama3.1": LLAMA3_1, "llama3.2": LLAMA3_2, "glm4": GLM4, "named": NAMED,
    "mistral": MISTRAL, "harmony": HARMONY,
}  # fmt: skip
SPECIALS = (
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>",
)  # fmt: skip


def save_tokenizer(folder: Path, template: Any = None, *, adds_bos: bool = False, **settings: Any) -> Path:
    """Write a tokenizer whose tokens are bytes and the special tokens of the templates; ``<s>`` is its BOS."""
    tokens = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    fast = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(list(SPECIALS))
    if adds_bos:
        fast.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder.mkdir(parents=True, exist_ok=True)
    fast.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"} | settings
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
