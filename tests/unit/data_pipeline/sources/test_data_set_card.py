"""Data set cards and links: a data set may only name its own files."""

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import SourceMissingError, SourceUnreadableError
from data_pipeline.sources.data_set_card import _is_own, require_own_files
from data_pipeline.sources.registry import list_slices, read_slice

SECRET = '{"text": "private"}\n'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set of one file, next to a private file."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "private.jsonl").write_text(SECRET)
    root = tmp_path / "set"
    (root / "data").mkdir(parents=True)
    (root / "data" / "a.jsonl").write_text('{"text": "own"}\n')
    return root


@pytest.fixture
def canary() -> Iterator[tuple[str, list[str]]]:
    """A local server, and its requests."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(f"{self.command} {self.path}")
            self.send_response(200)
            self.send_header("Content-Length", str(len(SECRET)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(SECRET.encode())

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()
    server.server_close()
    thread.join()


def name_files(root: Path, data_files: object, **options: object) -> str:
    config = {"config_name": "all", "data_files": data_files, **options}
    (root / "README.md").write_text(f"---\nconfigs: {json.dumps([config])}\n---\n# A data set\n")
    return f"hf:{root}"


def texts(source: str) -> list[str]:
    return [document.text for piece in list_slices(source) for document in read_slice(piece)]


OUTSIDE = (
    "{root}/../private.jsonl",
    "../private.jsonl",
    "data/../../private.jsonl",
    "data/*/../../../private.jsonl",
    "~/private.jsonl",
    "file://{root}/../private.jsonl",
    "file:{root}/../private.jsonl",
    "local:{root}/../private.jsonl",
    "{canary}/private.jsonl",
    "hf://datasets/other/repo/private.jsonl",
    "s3://bucket/private.jsonl",
    "zip://private.jsonl::{canary}/a.zip",
    "zip://private.jsonl::a.zip",
    "..\\private.jsonl",
    "\u00a0../private.jsonl\n",
)


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("form", ["string", "list", "split", "other config", "yaml", "data_dir"])
def test_a_readme_that_names_files_of_others_is_refused(
    folder: Path, canary: tuple[str, list[str]], name: str, form: str
) -> None:
    address, asked = canary
    named = name.format(root=folder, canary=address)
    data_files: object = {
        "string": named,
        "list": ["data/a.jsonl", named],
        "split": [{"split": "train", "path": [named]}, {"split": "test", "path": "data/a.jsonl"}],
    }.get(form, "data/a.jsonl")
    source = name_files(folder, data_files, **({"data_dir": named} if form == "data_dir" else {}))
    card = "README.md"
    if form == "yaml":
        card = ".huggingface.yaml"
        os.replace(folder / "README.md", folder / card)
        content = (folder / card).read_text().split("\n")[1]
        (folder / card).write_text(content.replace("data/a.jsonl", json.dumps(named)[1:-1]))
    if form == "other config":
        other = {"config_name": "other", "data_files": named}
        first = {"config_name": "all", "default": True, "data_files": "data/a.jsonl"}
        (folder / card).write_text(f"---\n\nconfigs:\n - {first}\n - {json.dumps(other)}\n---\n")
    with pytest.raises(SourceUnreadableError) as refused:
        list_slices(source)
    line = {"yaml": 1, "other config": 5}.get(form, 2)
    assert f"line {line} of its {card} names" in str(refused.value)
    assert not asked


@pytest.mark.parametrize(
    "data_files", ["data/a.jsonl", "./data/*.jsonl", "data/**", "**/a.jsonl", ["data/[a-z].jsonl"]]
)
def test_a_readme_may_name_its_own_files(folder: Path, data_files: object) -> None:
    assert texts(name_files(folder, data_files)) == ["own"]


def test_files_found_by_the_library_are_checked(folder: Path) -> None:
    for name in ("linked.jsonl", "data/b.jsonl"):
        (folder / name).symlink_to(folder.parent / "private.jsonl")
        with pytest.raises(
            SourceUnreadableError, match=rf"{name} is outside the data set, or a link"
        ):
            list_slices(name_files(folder, "**/*.jsonl"))
        (folder / "README.md").unlink()
        with pytest.raises(SourceUnreadableError, match="is outside the data set, or a link out"):
            list_slices(f"hf:{folder}")
        (folder / name).unlink()
    (folder / "elsewhere").symlink_to(folder.parent)
    with pytest.raises(SourceUnreadableError, match="is outside the data set, or a link out"):
        list_slices(name_files(folder, "elsewhere/private.jsonl"))


def test_links_within_a_data_set_and_of_the_hubs_cache_are_followed(folder: Path) -> None:
    (folder / "data" / "b.jsonl").symlink_to("a.jsonl")
    assert texts(name_files(folder, "data/*.jsonl")) == ["own", "own"]
    repository = folder.parent / "datasets--org--set"
    snapshot = repository / "snapshots" / "0123"
    for place in (repository / "blobs", snapshot):
        place.mkdir(parents=True)
    (repository / "blobs" / "abcd").write_text('{"text": "cached"}\n')
    (snapshot / "a.jsonl").symlink_to("../../blobs/abcd")
    assert texts(f"hf:{snapshot}") == ["cached"]


def test_the_path_of_an_image_in_a_record_is_not_opened(
    folder: Path, canary: tuple[str, list[str]]
) -> None:
    address, asked = canary
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    image = pa.array([{"bytes": None, "path": f"{address}/a.png"}], kind)
    table = pa.table({"text": ["own"], "image": image})
    features = {"text": {"dtype": "string", "_type": "Value"}, "image": {"_type": "Image"}}
    metadata = json.dumps({"info": {"features": features}})
    pq.write_table(
        table.replace_schema_metadata({"huggingface": metadata}), folder / "data" / "a.parquet"
    )
    source = name_files(folder, "data/a.parquet", columns=["text", "image"])
    (piece,) = list_slices(source)
    assert piece.kind == "hub"
    assert [document.text for document in read_slice(piece)] == ["own"]
    assert not asked


@pytest.mark.parametrize("suffix", ["tar", "png", "h5"])
def test_loaders_of_other_data_than_records_are_refused(folder: Path, suffix: str) -> None:
    (folder / "data" / f"a.{suffix}").write_bytes(b"")
    with pytest.raises(SourceUnreadableError, match=r"the loader .* is not supported"):
        list_slices(name_files(folder, f"data/a.{suffix}"))


def test_a_script_next_to_the_data_is_not_run(folder: Path) -> None:
    (folder / "set.py").write_text("raise SystemExit('run')\n")
    with pytest.raises(SourceMissingError, match="scripts are no longer supported"):
        list_slices(f"hf:{folder}")


@pytest.mark.parametrize("name", ["json", "parquet", "text", "buckets/org/set", "a/b/c", ".."])
def test_names_of_loaders_are_not_names_of_data_sets(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(folder / "data")
    if name == "..":
        assert texts("hf:..") == ["own"]
        return
    with pytest.raises(SourceMissingError, match="neither the name of a data set on the hub nor"):
        list_slices(f"hf:{name}")


LAUGHS = "a0: &a0 [x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 20)
)


@pytest.mark.parametrize(
    "yaml",
    [LAUGHS, "a: &a [*a]\n", "[" * 100_000, "- " * 2000, "a: !!python/object:os.system x\n["],
)
def test_yaml_bombs_are_refused(folder: Path, yaml: str) -> None:
    (folder / "README.md").write_text(f"---\n{yaml}\n---\n")
    with pytest.raises(SourceUnreadableError, match=r"the YAML of its README.md cannot be read"):
        list_slices(f"hf:{folder}")


@pytest.mark.parametrize("name", ["README.md", ".huggingface.yaml", "dataset_infos.json"])
def test_cards_must_be_regular_files_of_bounded_size(folder: Path, name: str) -> None:
    with (folder / name).open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(SourceUnreadableError, match=rf"its {name} is longer than 4,194,304 bytes"):
        list_slices(f"hf:{folder}")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(SourceUnreadableError, match=rf"{name}: not a regular file"):
        list_slices(f"hf:{folder}")


def test_paths_behind_aliases_and_merged_keys_are_checked() -> None:
    for yaml in (
        "x: &x {data_files: ../a}\nconfigs:\n- {<<: *x, config_name: a}\n",
        "k: &k data_files\nconfigs:\n- {*k : ../a, config_name: a}\n",
        'configs:\n- {"data\\x5ffiles": ../a}\n',
        "configs:\n- {? data_files : [{split: train, ? path : [../a]}]}\n",
        "configs:\n- {data_files: {train: {path: ../a}}}\n",
        "configs:\n- data_files: a\n  data_files: ../a\n",
    ):
        content = f"---\n{yaml}---   \n".encode()

        def read(name: str, _: int, content: bytes = content) -> bytes | None:
            return content if name == "README.md" else None

        with pytest.raises(SourceUnreadableError, match=r"names '\.\./a' under 'data_files'"):
            require_own_files("set", read)


@given(st.text(st.sampled_from("./~\\:a*[]-\n\t "), max_size=12))
def test_an_accepted_path_stays_within_its_folder(path: str) -> None:
    if _is_own(path):
        joined = os.path.normpath(os.path.join("/r/s", path))  # noqa: PTH118
        assert joined == "/r/s" or joined.startswith("/r/s/")
        assert "://" not in path
