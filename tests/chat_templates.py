"""Chat templates for tests: SmolLM2's own (Apache-2.0), and some built to the shape of those that other families publish.

And a tokenizer for a tiny chat model.
"""

from tokenizers.pre_tokenizers import ByteLevel

from real import smollm2

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Contents trimmed, the beginning inside the first message, two special tokens around a role.
LLAMA3 = """{%- set loop_messages = messages %}
{%- for message in loop_messages %}
    {%- set head = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' %}
    {%- set content = head + message['content'] | trim + '<|eot_id|>' %}
    {%- if loop.index0 == 0 %}
        {%- set content = bos_token + content %}
    {%- endif %}
    {{- content }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""

# A branch for tools, a system message of its own, messages indexed and not only looped over.
QWEN2 = """{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>system\nAnswer well.<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant") %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""

# Roles must take turns, [INST] is text (v0.2) or a control token (v0.3), the system message joins a user's.
MISTRAL_V2 = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant/user/assistant') }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.first and system_message is defined %}
            {{- " [INST] " + system_message + "\n\n" + message["content"] + " [/INST]" }}
        {%- else %}
            {{- " [INST] " + message["content"] + " [/INST]" }}
        {%- endif %}
    {%- else %}
        {{- " " + message["content"] + eos_token }}
    {%- endif %}
{%- endfor %}
"""
MISTRAL_V3 = MISTRAL_V2.replace('" [INST] "', '"[INST] "').replace('" [/INST]"', '"[/INST]"')

TEMPLATES = {"smollm2": SMOLLM2, "llama-3": LLAMA3, "qwen2": QWEN2, "mistral v0.2": MISTRAL_V2, "mistral v0.3": MISTRAL_V3}


def write_letters(folder) -> int:
    """A tokenizer.json that reads and writes letters, with SmolLM2's special tokens first; returns how many tokens it has."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = special + [letter for letter in sorted(ByteLevel.alphabet()) if letter < "\x7f" or letter in "ĠĊ"]
    smollm2.build_tokenizer(tokens, [], special).save(str(folder / "tokenizer.json"))
    return len(tokens)
