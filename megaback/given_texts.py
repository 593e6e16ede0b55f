"""Texts that the model continues at each validation (`validation.samples`). Loads no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from data_pipeline.errors import ConfigError
from data_pipeline.text.chat_format import ChatFormat
from data_pipeline.text.codec import Prompt, TextCodec
from megaback.config import Config


@dataclass(frozen=True, kw_only=True)
class GivenTexts:
    """Texts that the model continues at each validation, in its direction."""

    texts: tuple[str, ...]
    prompts: tuple[Prompt, ...]
    codec: TextCodec
    is_of_examples: bool
    """Whether they are the given side of instruction examples."""

    def whole(self, number: int, new_ids: Sequence[int]) -> str:
        """A given text with what is written, in reading order; of an example the latter alone."""
        if self.is_of_examples:
            return self.codec.render(new_ids)
        if not new_ids:
            return self.texts[number]
        return self.codec.render([*self.prompts[number].ids, *new_ids])


def given_texts(config: Config, codec_of_shards: TextCodec, *, is_of_examples: bool) -> GivenTexts:
    """Texts of `validation.samples`. Raises ConfigError for one that does not fit the context."""
    section, context_tokens = config.validation, config.batch.context_tokens
    codec = _codec_of_model(config, codec_of_shards)
    prompt_of = ChatFormat(codec).prompt if is_of_examples else codec.prompt
    prompts = tuple(prompt_of(given) for given in section.samples)
    for number, prompt in enumerate(prompts):
        if len(prompt.ids) + section.sample_tokens > context_tokens:
            raise ConfigError(
                f"validation.samples[{number}] is read as {len(prompt.ids):,} tokens, and "
                f"sample_tokens is {section.sample_tokens:,}: together more than the "
                f"{context_tokens:,} of batch.context_tokens; give a shorter text or fewer tokens"
            )
    return GivenTexts(
        texts=section.samples, prompts=prompts, codec=codec, is_of_examples=is_of_examples
    )


def _codec_of_model(config: Config, codec_of_shards: TextCodec) -> TextCodec:
    """The codec of the model in the direction of its samples."""
    stored, direction = codec_of_shards.format, config.validation.direction
    wanted = replace(
        stored, direction=direction or config.data.direction.first, both=config.data.is_both
    )
    if wanted == stored:
        return codec_of_shards
    return TextCodec.of(codec_of_shards.model_bytes, wanted)
