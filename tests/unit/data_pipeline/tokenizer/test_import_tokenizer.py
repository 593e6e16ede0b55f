"""`megaback import tokenizer`."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from data_pipeline.errors import OutputExistsError, TokenizerError
from data_pipeline.text.codec import Direction, TextCodec, Unit
from data_pipeline.tokenizer.import_tokenizer import import_tokenizer, main
from tests.helpers.bpe import NUM_IDS, qwen_content


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    given = tmp_path / "given"
    given.mkdir()
    (given / "tokenizer.json").write_bytes(qwen_content())
    return given


def test_the_map_of_ids_is_printed_and_the_file_is_usable(folder: Path) -> None:
    out = folder.parent / "new" / "tokenizer.json"
    size = str(NUM_IDS + 20)
    result = CliRunner().invoke(main, [str(folder), "--out", str(out), "--vocab-size", size])
    assert result.exit_code == 0, result.output
    assert f"<|startoftext|>{NUM_IDS:>11,}" in result.output
    assert "normalizer NFC" in result.output
    assert TextCodec.load(out, Direction.BACKWARD, Unit.TOKEN).vocab_size == NUM_IDS + 20


def test_a_file_of_another_kind_or_name_is_refused(folder: Path) -> None:
    with pytest.raises(TokenizerError, match=r"named tokenizer\.json"):
        import_tokenizer(folder, folder.parent / "new" / "tokenizer.model")
    with pytest.raises(TokenizerError, match="No such file"):
        import_tokenizer(folder / "none", folder.parent / "new" / "tokenizer.json")
    assert not (folder.parent / "new").exists()


def test_only_its_own_result_is_overwritten(folder: Path) -> None:
    out = folder.parent / "new" / "tokenizer.json"
    import_tokenizer(folder, out)
    with pytest.raises(OutputExistsError):
        import_tokenizer(folder, out)
    import_tokenizer(folder, out, overwrite=True)
    with pytest.raises(OutputExistsError):
        import_tokenizer(out, folder / "tokenizer.json", overwrite=True)
