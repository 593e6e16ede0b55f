"""Cache folder: other folders are refused, and other files in it are kept."""

import os
import stat
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import ConfigError, OutputExistsError
from data_pipeline.shards.cache_folder import MARKER, MARKER_NAME, require_cache_folder
from data_pipeline.shards.frame_cache import CachedShard, CacheSettings, FrameCache

ORIGIN = "https://example.org/set"
FRAME_BYTES = 100
OLD_KEY = "0123456789abcdef"


def frames_in(folder: Path, max_bytes: int = 10 * FRAME_BYTES) -> CachedShard:
    return FrameCache(CacheSettings(folder, max_bytes), ORIGIN).of_shard("a.zst")


def put(frames: CachedShard, *numbers: int) -> None:
    for number in numbers:
        frames.put(number, bytes([number]) * FRAME_BYTES)


def is_kept(frames: CachedShard, number: int) -> bool:
    return frames.get(number, FRAME_BYTES) == bytes([number]) * FRAME_BYTES


def content(folder: Path) -> dict[str, object]:
    """Everything below a folder, links not followed."""
    found: dict[str, object] = {}
    for path in folder.rglob("*"):
        if path.is_symlink():
            found[str(path.relative_to(folder))] = path.readlink()
        elif path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A full cache."""
    folder = tmp_path / "cache"
    put(frames_in(folder), *range(10))
    return folder


FOREIGN = {
    "a file of the user's": "thesis.tex",
    "a file in a folder": "photos/1.jpg",
    "a hidden file": ".bashrc",
    "numbered files": "2024/1",
    "a shard's folder with another file": f"{OLD_KEY}/1.txt",
    "a shard's folder with a folder": f"{OLD_KEY}/1/2",
    "a frame's name without a shard's": "1",
    "the tag of another program": MARKER_NAME,
}


@pytest.mark.parametrize("name", FOREIGN.values(), ids=FOREIGN)
def test_a_folder_with_other_files_is_refused_and_not_changed(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(MARKER.splitlines()[0])
    (tmp_path / ".bytes").write_bytes(b"9")
    before = content(tmp_path)
    with pytest.raises(OutputExistsError, match="was not changed"):
        require_cache_folder(tmp_path)
    put(frames_in(tmp_path), *range(20))  # as if the file had been added later
    assert content(tmp_path) == before


def test_links_do_not_make_a_folder_a_cache(tmp_path: Path) -> None:
    folder, mine = tmp_path / "folder", tmp_path / "mine"
    (mine / OLD_KEY).mkdir(parents=True)
    (mine / OLD_KEY / "1").write_bytes(b"mine")
    folder.mkdir()
    (folder / OLD_KEY).symlink_to(mine / OLD_KEY)
    with pytest.raises(OutputExistsError):
        require_cache_folder(folder)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(OutputExistsError):
        require_cache_folder(tmp_path / "file")


@pytest.mark.parametrize("name", ["", "absent/cache", "lost+found", ".DS_Store"])
def test_a_missing_or_empty_folder_becomes_a_cache(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "absent" / "cache"
    if name.startswith(("lost", ".DS")):
        folder.mkdir(parents=True)
        (folder / name).mkdir()
    require_cache_folder(folder)
    put(frames_in(folder), 1)
    assert (folder / MARKER_NAME).read_bytes() == MARKER
    assert is_kept(frames_in(folder), 1)
    require_cache_folder(folder)


def test_the_marker_is_a_cache_directory_tag(cache: Path) -> None:
    # https://bford.info/cachedir/: the file begins with these 43 bytes.
    assert (cache / "CACHEDIR.TAG").read_bytes()[:43] == (
        b"Signature: 8a477f597d28d172789f06886806bc55"
    )


def test_the_folder_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "cache").symlink_to(tmp_path / "disk")
    require_cache_folder(tmp_path / "cache")
    put(frames_in(tmp_path / "cache"), 1)
    assert is_kept(frames_in(tmp_path / "disk"), 1)


def test_a_cache_of_an_earlier_version_is_reused_without_its_frames(tmp_path: Path) -> None:
    old = tmp_path / OLD_KEY
    old.mkdir()
    (tmp_path / ".lock").touch()
    (tmp_path / ".bytes").write_bytes(b"1000")
    for number in range(9):
        (old / str(number)).write_bytes(bytes(FRAME_BYTES))
        os.utime(old / str(number), ns=(2 * time.time_ns(),) * 2)
    (old / ".7.0123456789ab.partial").write_bytes(bytes(FRAME_BYTES))
    require_cache_folder(tmp_path)
    frames = frames_in(tmp_path)
    put(frames, *range(9))
    # Frames of the old format are removed first, however recent.
    assert all(is_kept(frames, number) for number in range(9))
    assert len(list(old.glob("*"))) <= 1
    put(frames, 9, 10)
    assert not old.exists()


def test_links_and_other_files_in_a_cache_are_never_counted_read_or_removed(
    cache: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    key = frames_in(cache).key
    for name in ("1", "2", ".3.0123456789ab.partial", "secret"):
        mine.mkdir(exist_ok=True)
        (mine / name).write_bytes(bytes(5000))
        os.utime(mine / name, ns=(0, 0))
    (cache / ("a" * 64)).symlink_to(mine)
    (cache / OLD_KEY).symlink_to(mine)
    (cache / key / "77").symlink_to(mine / "secret")
    strangers = ["thesis.tex", "b" * 63 + "/1", f"{key}/01", f"{key}/1.txt", f"{key}/.1.partial"]
    for name in [*strangers, f"{key}/-1", f"{key}/notes/1", "C" * 64 + "/1"]:
        (cache / name).parent.mkdir(exist_ok=True)
        (cache / name).write_bytes(bytes(5000))
        os.utime(cache / name, ns=(0, 0))
    others = {name: data for name, data in content(cache).items() if not _is_ours(name, key)}
    frames = frames_in(cache)
    put(frames, *range(10, 60))
    kept = {name: data for name, data in content(cache).items() if not _is_ours(name, key)}
    assert kept == others
    assert all((mine / name).stat().st_size == 5000 for name in ("1", "2", "secret"))
    assert frames.get(77, 5000) is None
    # Other files do not count toward the size.
    assert sum(is_kept(frames, number) for number in range(60)) >= 9
    frames.put(77, b"x" * FRAME_BYTES)  # a frame's name: replaces the link, not its target
    assert (mine / "secret").read_bytes() == bytes(5000)


def _is_ours(name: str, key: str) -> bool:
    folder, _, frame = name.rpartition("/")
    return (folder == key and frame.isdecimal() and frame[0] != "0" and frame != "77") or name in (
        *(".lock", ".bytes", MARKER_NAME, f"{key}/0"),
    )


NAMES = st.one_of(
    st.sampled_from(["1", "12", ".lock", ".bytes", OLD_KEY, "f" * 64, ".1.0123456789ab.partial"]),
    st.text(st.sampled_from("01af.-x"), min_size=1, max_size=17).filter(
        lambda name: name not in (".", "..")
    ),
)


@settings(max_examples=150, deadline=None)
@given(paths=st.lists(st.lists(NAMES, min_size=1, max_size=3), min_size=1, max_size=6))
def test_any_folder_is_a_cache_or_is_not_changed(
    tmp_path_factory: pytest.TempPathFactory, paths: list[list[str]]
) -> None:
    folder = tmp_path_factory.mktemp("folder")
    for parts in paths:
        path = folder.joinpath(*parts)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"mine")
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            continue
    before = content(folder)
    allowed = {
        name
        for name in before
        if name in (".lock", ".bytes")
        or (
            name.count("/") == 1
            and name.partition("/")[0] in (OLD_KEY, "f" * 64)
            and (name.partition("/")[2] in ("0", "1", ".1.0123456789ab.partial") or _number(name))
        )
    }
    try:
        require_cache_folder(folder)
        is_refused = False
    except OutputExistsError:
        is_refused = True
    assert is_refused == (set(before) != allowed)
    put(frames_in(folder), *range(30))
    if is_refused:
        assert content(folder) == before


def _number(name: str) -> bool:
    frame = name.partition("/")[2]
    return frame.isdecimal() and frame[0] != "0"


def test_a_folder_replaced_while_open_is_not_written_to(cache: Path, tmp_path: Path) -> None:
    frames = frames_in(cache)
    put(frames, 10)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "1").write_bytes(b"mine")
    cache.rename(tmp_path / "moved")
    cache.symlink_to(mine)
    put(frames, *range(11, 40))
    assert content(mine) == {"1": b"mine"}
    assert is_kept(frames_in(tmp_path / "moved"), 39)


@pytest.mark.parametrize("planted", ["huge", "pipe", "folder"])
def test_files_that_are_not_frames_are_neither_read_nor_waited_for(
    cache: Path, planted: str
) -> None:
    frames = frames_in(cache)
    path = cache / frames.key / "9"
    path.unlink()
    if planted == "huge":
        with path.open("wb") as file:
            file.truncate(1 << 40)
    elif planted == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    started = time.monotonic()
    assert frames.get(9, FRAME_BYTES) is None
    assert time.monotonic() - started < 1
    if planted != "folder":
        put(frames, 9)
        assert is_kept(frames, 9)


def test_bookkeeping_is_not_written_through_links(cache: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_bytes(b"mine")
    for name in (".bytes", ".lock"):
        (cache / name).unlink()
        (cache / name).symlink_to(mine)
        put(frames_in(cache), 77)
        (cache / name).unlink()
        (cache / name).symlink_to(tmp_path / "absent")
        put(frames_in(cache), 78)
        (cache / name).unlink()
    assert mine.read_bytes() == b"mine"
    assert not (tmp_path / "absent").exists()


def test_a_cache_folder_is_private(tmp_path: Path) -> None:
    put(frames_in(tmp_path / "deep" / "cache"), 1)
    assert stat.S_IMODE((tmp_path / "deep" / "cache").stat().st_mode) & 0o077 == 0


def test_a_world_writable_folder_is_refused(cache: Path) -> None:
    cache.chmod(0o777)
    with pytest.raises(ConfigError, match="chmod o-w"):
        require_cache_folder(cache)
    assert not is_kept(frames_in(cache), 9)
    cache.chmod(0o770)
    require_cache_folder(cache)
    assert is_kept(frames_in(cache), 9)


def test_a_folder_of_another_user_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:
        os.chown(cache, 4321, -1)
        require_cache_folder(cache)  # root: files in a container often belong to others
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    with pytest.raises(ConfigError, match="another user"):
        require_cache_folder(cache)
    assert not is_kept(frames_in(cache), 9)
