"""Chat template of a GGUF file: what llama.cpp makes of messages.

Without a template llama.cpp falls back to ChatML, and a backward model then responds with noise. No
template can reverse ids, so that of a backward model raises an error. A forward model's gives the
ids of an instruction, and raises one for a chat that has no such ids. llama.cpp's servers render
probe messages at startup and exit if they fail, so these render.
"""

import json

from data_pipeline.text.chat_format import (
    INSTRUCTION_PIECE,
    RESPONSE_PIECE,
    START_PIECE,
    STOP_PIECE,
)
from data_pipeline.text.codec import Direction, TextCodec
from tools.export.gguf_vocabulary import markers_of

_PROBES = ["You are a helpful assistant|Hello|Hi there|How are you?", "test"]
"""Conversations that llama.cpp's servers render at startup, joined by `|`."""
# A server thinks in its probes, and in a chat only if it is asked to: the template has no thinking.
# Contents are read one by one, or else the server would hide system messages in the user's.
_READ = (
    "{%- set said = namespace(parts=[]) -%}"
    "{%- for message in messages -%}{%- if message.content is string -%}"
    "{%- set said.parts = said.parts + [message.content] -%}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if (enable_thinking is not defined or enable_thinking)"
    " and said.parts | join('|') in PROBES -%}"
    "{{ said.parts | join('|') }}"
)
_INSTRUCTION = (
    "{%- elif messages | length != 1 or messages[0].role != 'user'"
    " or said.parts | length != 1 or not said.parts[0] | trim -%}REFUSE_CHAT"
    "{%- elif tools or documents -%}REFUSE_TOOLS"
    "{%- else -%}"
    "{%- for marker in MARKERS -%}{%- if marker in said.parts[0] -%}REFUSE_MARKER"
    "{%- endif -%}{%- endfor -%}"
    f"{START_PIECE}{INSTRUCTION_PIECE}"
    "{{ said.parts[0] | trim }}"
    f"{STOP_PIECE}"
    "{%- if add_generation_prompt -%}"
    f"{START_PIECE}{RESPONSE_PIECE}"
    "{%- endif -%}{%- endif -%}"
)
_BACKWARD = "{%- else -%}REFUSE{%- endif -%}"
_REASONS = {
    "REFUSE_CHAT": "this model takes one instruction at a time, as one message of the user with "
    "text: no system message, and no earlier turns",
    "REFUSE_TOOLS": "this model was not trained on tools and documents: omit them",
    "REFUSE_MARKER": "the instruction spells a marker of the model, which llama.cpp would read as "
    "the marker itself: change its text",
    "REFUSE": "this model reads and writes backward, which no chat template can do: give "
    "/completion ids in the order in which the model reads, see README.md beside the file",
}


def chat_template(codec: TextCodec) -> str:
    """Jinja template: an error for a backward model; one instruction for a forward model."""
    is_backward = codec.format.direction is Direction.BACKWARD
    template = _READ + (_BACKWARD if is_backward else _INSTRUCTION)
    probes = _PROBES if is_backward else _PROBES[:1]  # "test" is an instruction as any other
    for name, reason in _REASONS.items():
        template = template.replace(name, "{{ raise_exception(" + json.dumps(reason) + ") }}")
    markers = json.dumps(markers_of(codec), ensure_ascii=False)
    return template.replace("PROBES", json.dumps(probes)).replace("MARKERS", markers)
