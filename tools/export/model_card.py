"""Model card (README.md) of a transformers export: runnable examples, and supported uses."""

from pathlib import Path

from data_pipeline.common.control_characters import on_one_line
from data_pipeline.text.codec import Direction, TextCodec, TextFormat
from megaback.origins import WeightsIdentity
from megaback.weights.model_folder import ModelDescription

REMOTE_CODE = sorted(
    path
    for path in Path(__file__).with_name("remote_code").glob("*.py")
    if not path.name.startswith(("__", "bpe_"))
)
"""Files of code in an export, which run with `trust_remote_code=True`. With byte-level BPE, a file
takes the place of the one whose name it has after `bpe_`."""
COMMIT = "COMMIT"
"""Placeholder: the commit of an upload is unknown at export. No branch has this name, so loading
from a hub fails, and runs no unreviewed code, until it is replaced."""
_MAX_NEW_TOKENS = 200
_ENDINGS = ("and they lived happily ever after.", "ever after.", ".")
_BEGINNINGS = ("Once upon a time there was", "Once upon", "O")


def example_of(codec: TextCodec, context_tokens: int) -> tuple[str, int]:
    """A text to continue, and the number of new tokens that fit the context with it."""
    is_backward = codec.format.direction is Direction.BACKWARD
    texts = _ENDINGS if is_backward else _BEGINNINGS
    for text in texts:
        given_tokens = 1 + len(codec.encode(text))
        if 2 * given_tokens <= context_tokens:
            break
    return text, max(1, min(_MAX_NEW_TOKENS, context_tokens - given_tokens))


def both_directions(text_format: TextFormat, kind: str) -> str:
    """Paragraph of a card on the other direction of a model of both; empty for one of one."""
    if not text_format.both:
        return ""
    (other,) = set(Direction) - {text_format.direction}
    return (
        f"A model of both directions, of which this folder has the markers of one. With the same\n"
        f"weights, the run or full model that it was made from is exported in the other one by\n"
        f"`megaback convert --to {kind} --direction {other.value}`.\n\n"
    )


def average_of(description: ModelDescription) -> str:
    """Paragraph of a card on the sources of a mean of weights; empty for other weights."""
    average = description.average
    if average is None:
        return ""
    losses = ""
    if average.last_val_loss is not None and description.val_loss is not None:
        losses = (
            f"Val loss: {description.val_loss:.4f} nats per token, and {average.last_val_loss:.4f} "
            "of the last one alone.\n\n"
        )
    rows = "".join(f"- {_shown(source)}\n" for source in average.sources)
    return f"The weights are the mean of those of:\n{rows}\n{losses}"


def branch_of(description: ModelDescription) -> str:
    """Paragraph of a card on the trunk of a branch; empty for other weights."""
    branch = description.branch
    if branch is None:
        return ""
    what = "The last of these is" if description.average is not None else "The weights are"
    return (
        f"{what} of a branch. It continues ({', '.join(branch.kept)}) the checkpoint:\n"
        f"- {_shown(branch.trunk)}\n\nIts own data: {_quoted(branch.data)}.\n\n"
    )


def import_of(description: ModelDescription) -> str:
    """Paragraph of a card on the model of another program; empty for other weights."""
    imported = description.imported
    if imported is None:
        return ""
    kind, direction = on_one_line(imported.kind), description.text_format.directions.value
    began = "The weights come from"
    note = (
        "If it was trained in another direction, they are a starting point for\n"
        "training in this one.\n\n"
    )
    if description.training is not None:
        began, note = "Training began with the weights of", "\n" if imported.added_rows else ""
    return (
        f"{began} a model of another program ({kind}), imported as {direction}:\n"
        f"- {_shown(imported.base)}\n\n{_added(imported.added_rows)}{note}"
    )


def _added(rows: int) -> str:
    if not rows:
        return ""
    return f"Rows of its embeddings added for markers, each the mean of the others: {rows}.\n"


def training_of(description: ModelDescription) -> str:
    """Paragraph of a card on the data and the base of the weights; empty if they are unknown."""
    training = description.training
    if training is None:
        return ""
    base = "" if training.base is None else f" Fine-tuned from {_quoted(training.base)}."
    return f"Data: {_quoted(training.data)}.{base}\n\n"


def origin_of(description: ModelDescription, kind: str) -> str:
    """Paragraphs of a card on where the weights come from; `kind`: the format of the export."""
    return (
        both_directions(description.text_format, kind)
        + average_of(description)
        + branch_of(description)
        + import_of(description)
        + training_of(description)
    )


def facts_of(description: ModelDescription) -> str:
    """Paragraph of a card on how the model reads, its sizes and its val loss."""
    text_format, training = description.text_format, description.training
    val_loss = "" if description.val_loss is None else f", val loss {description.val_loss:.4f} nats"
    if val_loss and training is not None and training.val_bits_per_byte is not None:
        val_loss += f" per token ({training.val_bits_per_byte:.4f} bits/byte)"
    return f"""\
Direction: {text_format.direction.value}. Unit: {text_format.unit.value}. Context:
{description.context_tokens} tokens. Vocabulary: {description.vocab_size}. Trained for
{description.step} steps{val_loss}. Tokenizer's SHA-256: `{text_format.tokenizer_sha256}`.
"""


def _shown(weights: WeightsIdentity) -> str:
    step = "" if weights.step is None else f", step {weights.step}"
    sha256 = "" if weights.sha256 is None else f", SHA-256 `{weights.sha256}`"
    data = "" if weights.data is None else f", data {_quoted(weights.data)}"
    return f"{_quoted(weights.path)}{step}{sha256}{data}"


def _quoted(text: str) -> str:
    return f"`{on_one_line(text).replace('`', '')}`"


def model_card(description: ModelDescription, codec: TextCodec, name: str) -> str:
    """The card, which begins with the lines that use the model correctly."""
    text_format = description.text_format
    is_backward = text_format.direction is Direction.BACKWARD
    stock = "Qwen3" if description.shape.qk_norm else "Llama"
    given, new_tokens = example_of(codec, description.context_tokens)
    what = "before an ending" if is_backward else "after a beginning"
    given_role, given_part, written_part = "assistant", "a response", "instruction for it"
    if not is_backward:
        given_role, given_part, written_part = "user", "an instruction", "response to it"
    files = ", ".join(f"`{path.name}`" for path in REMOTE_CODE)
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

name, commit = "{name}", "{COMMIT}"  # the commit that you have read; see below
tokenizer = AutoTokenizer.from_pretrained(name, revision=commit, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(name, revision=commit)
ids = model.generate(**tokenizer.prompt("{given}"), max_new_tokens={new_tokens})[0]
print(tokenizer.decode(ids, skip_special_tokens=True))
```

A model that writes the text {what}. `tokenizer.prompt` gives the ids in the order in which the
model reads them (of a list of texts: a batch), and `decode` the text in the order in which a person
does: there is nothing to reverse by hand. Always decode the whole list of ids, the given ones
included. The model itself is a stock {stock}.

**`trust_remote_code` runs code of this folder on your machine:** {files}.
Read these files first. From a hub, load the commit that you have read, by its full hash in place of
`{COMMIT}`: a branch can be moved to other code later.
`huggingface_hub.HfApi().model_info(NAME).sha` is the newest commit. For a folder on your own disk,
transformers ignores `revision`.

The same as a pipeline, which also takes a list of texts (with `batch_size`), `stop` texts, and a
`streamer=write.tokenizer.streamer(print)`:

```python
from transformers import pipeline

name, commit = "{name}", "{COMMIT}"
write = pipeline("megaback-reverse", model=name, revision=commit, trust_remote_code=True)
print(write("{given}", max_new_tokens={new_tokens})[0]["generated_text"])
```

Without `max_new_tokens`, `generate` writes 20 tokens.

If it was fine-tuned on instructions,
`write([{{"role": "{given_role}", "content": "{given_part}"}}])` writes the {written_part}.
`tokenizer.apply_chat_template` gives the ids of messages, and
`tokenizer.example(instruction, response)` the ids and labels of an example to fine-tune on.

{_BACKWARD_USES if is_backward else _FORWARD_USES}
{origin_of(description, "hf")}{facts_of(description)}
`megaback sample` reads this folder too.
"""


_TRAINING = """- Training (Trainer, peft): the ids of a document are
  `tokenizer(text).input_ids + [tokenizer.eos_token_id]`. Save model and tokenizer with
  `save_pretrained` (an adapter after `merge_and_unload()`): megaback reads that folder as well.
"""

_BACKWARD_USES = f"""**Right:**
- The two examples above.
- `tokenizer(text)` for log-probabilities: the model reads a text from its end.
{_TRAINING}- Servers such as vLLM with ids only: `tokenizer(text).input_ids` in, new ids out, and
  `decode` of all of them. `megaback serve` speaks OpenAI's protocol in text.

**Not right, and refused with an error:** loading the tokenizer without `trust_remote_code=True`;
the stock `text-generation` pipeline around a loaded model; `TextStreamer` (use
`tokenizer.streamer`); `stop_strings` (use `stop` of the pipeline); chats
as text; other chat templates; new tokens.

**Not right, without an error:**
- Servers that turn ids into text piece by piece (the text endpoints of vLLM and of others, streamed
  or not): pieces come in the model's order.
- lm_eval's `hf`: it takes the tail of `encode(context + continuation)` for the continuation, and
  here that is the context; its results are those of chance. `megaback score` and `megaback eval`
  score the right part.
- Looking for a text's ids in those of a longer text: the end of a text comes first.
"""

_FORWARD_USES = f"""**Right:** whatever a causal model of transformers is used for, with
`trust_remote_code=True`; without it the tokenizer cannot be loaded. No text becomes a marker: new
tokens, chats as text and other chat templates are refused with an error.

{_TRAINING}"""
