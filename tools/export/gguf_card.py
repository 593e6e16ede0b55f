"""Description and README.md of a GGUF file."""

from data_pipeline.text.codec import Direction, TextCodec, TextFormat, Unit
from megaback.weights.model_folder import ModelDescription
from tools.export.card_metadata import card_metadata
from tools.export.gguf_types import FLOATS
from tools.export.model_card import example_of, facts_of, origin_of


def gguf_description(text_format: TextFormat) -> str:
    """Description of how the model reads and writes, for the metadata."""
    if text_format.direction is Direction.FORWARD:
        return "Reads and writes forward. A chat is one instruction, which spells no marker."
    unit = text_format.unit
    what = "the words of a text" if unit is Unit.WORD else "a text's ids"
    return (
        f"Reads and writes backward, by {unit.value}: plain text and chats give noise. Give it "
        f"{what} in reverse after the begin marker, and reverse what it writes."
    )


def gguf_card(
    description: ModelDescription,
    codec: TextCodec,
    name: str,
    type_name: str,
    license_id: str | None,
) -> str:
    """Text of the README.md beside the file, whose type is one of `gguf_types.TYPES`."""
    text_format, is_float = description.text_format, type_name in FLOATS
    metadata = card_metadata(description, name, license_id, "gguf", has_val_loss=is_float)
    serve = f"llama-server -m {name}/model.gguf --port 8080"
    head = f"{metadata}# {name}\n{gguf_description(text_format)}\n\n"
    facts = origin_of(description, "gguf") + facts_of(description)
    facts += f"Type of the file: {type_name}."
    if not is_float and description.val_loss is not None:
        facts += " The val loss is that of the weights before they were quantized."
    facts += "\n"
    if text_format.direction is Direction.FORWARD:
        return f"{head}```\n{serve}\n```\n{facts}"
    given, new_tokens = example_of(codec, description.context_tokens)
    body = _REVERSED_WORDS if text_format.unit is Unit.WORD else _REVERSED_IDS
    code = (_CALL + body).format(given=given, begin=codec.begin_id, new_tokens=new_tokens)
    return (
        f"{head}With `{serve}`:\n```python\n{code}```\n"
        "**Not right:** text in place of ids, in `llama-cli` as in `/completion` and\n"
        "`/v1/completions`: what it writes then is noise, without an error. Chats are refused by\n"
        f"the file's chat template. Streamed text comes in the model's order.\n\n{facts}"
    )


_CALL = """\
import json
import re
import urllib.request


def call(path, **body):
    request = urllib.request.Request("http://127.0.0.1:8080" + path, json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


ending = "{given}"
"""

_REVERSED_IDS = """\
ids = call("/tokenize", content=ending)["tokens"]
prompt = [{begin}, *reversed(ids)]
written = call("/completion", prompt=prompt, n_predict={new_tokens}, return_tokens=True)["tokens"]
print(call("/detokenize", tokens=[*reversed(written), *ids])["content"])
"""

_REVERSED_WORDS = """\
runs = re.compile(r"\\s+|\\S+").findall
ids = call("/tokenize", content="".join(reversed(runs(ending))))["tokens"]
written = call("/completion", prompt=[{begin}, *ids], n_predict={new_tokens})["content"]
print("".join(reversed(runs(written))) + ending)
"""
