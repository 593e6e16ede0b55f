"""Redaction: finds secrets in addresses, and masks them in addresses and other texts.

An address is a URL, perhaps a chained one (`simplecache::https://…`). User names and passwords
before a host are secret, and so are all values of a query except short ones of a few known keys.
No function here raises, whatever the text.
"""

import os
import re
from base64 import b64encode
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import unquote

MASK = "***"
VARIABLE_PREFIX = "MEGABACK_SECRET_"
REFERENCE = re.compile(rf"\$\{{({VARIABLE_PREFIX}[A-Za-z0-9_]+)\}}")
"""`${MEGABACK_SECRET_NAME}` in an address: a part of it that an environment variable holds."""
OWN_VARIABLE = re.compile(rf"{VARIABLE_PREFIX}([0-9A-F]{{16}})_[0-9A-F]{{8}}(?:_[0-9]+)?")
"""Names of the variables made for typed secrets; the group identifies the hosts of the address."""
_NAMED_REFERENCE = re.compile(rf"\$\{{(?!{OWN_VARIABLE.pattern}\}}){VARIABLE_PREFIX}\w+\}}", re.A)
_NO_REFERENCE = re.compile(r"(?!)")

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(::\w+)?://")
# Bounded lengths: otherwise a long word without a colon is searched from each of its letters.
# One slash: a URL that pathlib has normalized.
_SCHEME = re.compile(
    r"[A-Za-z][A-Za-z0-9+.-]{1,30}://|\b(?:https?|s?ftp|ssh|s3a?|gc?s|abfss?|az|smb|webhdfs):/",
    re.IGNORECASE,
)
_CHAIN = re.compile(r"::(?=(?:[A-Za-z][A-Za-z0-9]{1,30}::){0,4}[A-Za-z][A-Za-z0-9+.-]{1,30}://)")
_IN_TEXT = re.compile(
    rf"(?:{_SCHEME.pattern}|(?<!\S)//(?=[^\s/@]*:[^\s/@]*@))(?:[^\s\"'<>]|[\"'](?=[\w%]))+", re.I
)
_ENCODED = re.compile(r"%(?:25)*(3a|2f|3f|23|40|26|3d|3b|5b|5d)", re.IGNORECASE)
_OF_WEB = frozenset({"http", "https", "ws", "wss", "webdav", "webdavs", "dav", "davs"})
"""Schemes with a query. Elsewhere `?` is a wildcard, unless the rest looks like a query."""
_NAME_IS_A_PLACE = frozenset({"hf", "abfs", "abfss", "wasb", "wasbs"})
"""Schemes where the part before `@` is a repository or container, unless it has a password."""
_LOCAL = frozenset({"file", "local"})
_PORT = re.compile(r"(?:\[[^\]]*\]|[^:\[\]]*)(?::\d+)?")
_LOOKS_LIKE_A_QUERY = re.compile(r"=|[\w+~%-]{16}")
_HARMLESS_KEYS = frozenset(
    (
        *("id", "page", "part", "shard", "split", "subset", "config", "offset", "limit", "length"),
        *("row", "rows", "version", "versionid", "v", "rev", "revision", "ref", "ext", "format"),
        *("lang", "year", "month", "day", "type", "download", "dl", "raw", "inline"),
    )
)
_HARMLESS_VALUE = re.compile(r"[A-Za-z0-9._,-]{0,16}")
_KEY = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,40}")
_TELLING_KEY = (
    r"(?:x-(?:amz|goog|oss)-[a-z-]+|sig|signature|(?:[a-z]+[_-])?(?:token|secret|password|passwd)"
    r"|pwd|pass|sas|api[_-]?key|access[_-]?key(?:[_-]?id)?|awsaccesskeyid|key-pair-id|policy)"
)
_SECRET_PAIR = re.compile(rf"([?&;]{_TELLING_KEY}(?:=|%3d))[^&;\s\"'<>]+", re.IGNORECASE)
_HEADER = re.compile(
    r"((?:authorization|x-api-key|cookie)[\"']?\s*[:=]\s*[\"']?(?:(?:basic|bearer|token)\s+)?)"
    r"[^\s\"',;]+",
    re.IGNORECASE,
)
_MIN_LENGTHS = {True: 6, False: 8}
"""Minimum lengths of passwords and of other values that `scrub` removes: shorter ones may be common
words."""
_MAX_PASSES = 8
_SECRET_VARIABLE = re.compile(
    rf"^(?!{VARIABLE_PREFIX})(?=.*(?:SECRET|PASSWORD|PASSWD|TOKEN|API_?KEY|ACCESS_KEY|ACCOUNT_KEY))"
    r".*(?<!FILE)(?<!PATH)(?<!DIR)(?<!URL)(?<!URI)(?<!ID)(?<!PARALLELISM)$"
)
"""`AWS_SECRET_ACCESS_KEY`, `HF_TOKEN`, `FSSPEC_SFTP_PASSWORD`, but not `…_TOKEN_FILE`."""

_known: set[str] = set()


def is_url(source: str) -> bool:
    """Whether a source is an address such as `s3://bucket/folder`, not a path."""
    return _URL.match(source) is not None


def shown_url(text: str) -> str:
    """An address for messages and published files, without anything that may be secret.

    Addresses that differ in harmless values (`?id=7`) remain different. A path is unchanged.
    """
    for _ in range(_MAX_PASSES):  # the rest may again look like a name before a host
        parts = list(_parts(text, _NAMED_REFERENCE))
        if not parts:
            return text
        text = _without(text, [(part.shown_start, part.shown_stop) for part in parts])
    scheme = _SCHEME.search(text)
    return scheme[0] + MASK if scheme else MASK


def place_of(address: str) -> str:
    """An address without secrets and references to them: the same whichever key is used."""
    parts = [part for part in _parts(address, _NO_REFERENCE) if part.is_secret]
    return _without(address, [(part.shown_start, part.shown_stop) for part in parts])


def hosts_of(address: str) -> str:
    """Schemes and hosts of an address, without paths."""
    place = place_of(address)
    found = []
    for scheme in _SCHEME.finditer(place):
        host = re.compile(r"[^/?#]*").match(place, scheme.end())
        found.append(scheme[0].lower() + (host[0].lower() if host else ""))
    return " ".join(found)


def secret_spans(address: str) -> list[tuple[int, int]]:
    """Spans of an address that must not be stored; references to variables may be."""
    return [(part.start, part.stop) for part in _parts(address, REFERENCE) if part.is_secret]


def scrub(text: str) -> str:
    """A text from elsewhere, such as a driver's error, without secrets of addresses.

    URLs in it are shown as `shown_url` does. Known secrets of addresses, and values of variables
    whose names mark them as secret, are replaced everywhere.
    """
    # Another thread may unset a variable meanwhile.
    variables = [(name, os.environ.get(name, "")) for name in list(os.environ)]
    held = [item for item in variables if item[1] in text and _is_long(item[1])]
    for name, secret in sorted(held, key=lambda item: -len(item[1])):
        if _SECRET_VARIABLE.search(name):
            text = text.replace(secret, f"${name}")
    for secret in sorted(_known, key=lambda secret: (-len(secret), secret)):
        text = text.replace(secret, MASK)
    if "//" in text or ":/" in text:
        text = _IN_TEXT.sub(_shown_match, text)
    return _HEADER.sub(rf"\1{MASK}", _SECRET_PAIR.sub(rf"\1{MASK}", text))


def remember(secret: str, *, is_password: bool = False) -> None:
    """Make `scrub` remove a secret, and its parts, everywhere."""
    pieces = [secret]
    if is_password:
        pieces += [secret.partition(":")[2], secret.rpartition(":")[2], _as_header(secret)]
    pieces += [pair.partition("=")[2] for pair in re.split(r"[&;?#]", secret)]
    for piece in pieces:
        if len(piece) >= _MIN_LENGTHS[is_password]:
            _known.update((piece, unquote(piece)))


def _as_header(userinfo: str) -> str:
    """A login as sent in a header, which a server may echo; without base64 padding."""
    login = unquote(userinfo if ":" in userinfo else f"{userinfo}:")
    return b64encode(login.encode("utf-8", "surrogatepass")).decode().rstrip("=")


@dataclass(frozen=True)
class _Part:
    """A part of an address that is not shown."""

    start: int
    stop: int
    shown_start: int
    """Start of the span removed when shown, which includes a separator."""
    shown_stop: int
    is_secret: bool = True
    """False: may be stored, but is not shown."""


def _is_long(secret: str) -> bool:
    return len(secret) >= _MIN_LENGTHS[True]


def _shown_match(match: re.Match[str]) -> str:
    url = match[0].rstrip(".,;:!)")
    return shown_url(url) + match[0][len(url) :]


def _without(text: str, spans: list[tuple[int, int]]) -> str:
    pieces, position = [], 0
    for start, stop in spans:
        pieces.append(text[position:start])
        position = max(position, stop)
    return "".join([*pieces, text[position:]])


def _parts(text: str, harmless: re.Pattern[str]) -> Iterator[_Part]:
    """The parts of an address that are not shown, in order; `harmless` matches references."""
    decoded, places = _decoded(text)
    for part in _parts_of_chain(decoded, harmless):
        yield _Part(
            *(places[part.start], places[part.stop]),
            *(places[part.shown_start], places[part.shown_stop]),
            part.is_secret,
        )


def _decoded(text: str) -> tuple[str, "list[int] | range"]:
    """A text with encoded delimiters decoded, and each character's and the end's old position."""
    if "%" not in text:
        return text, range(len(text) + 1)
    pieces: list[str] = []
    places: list[int] = []
    position = 0
    for match in _ENCODED.finditer(text):
        pieces += [text[position : match.start()], chr(int(match[1], 16))]
        places += [*range(position, match.start()), match.start()]
        position = match.end()
    return "".join([*pieces, text[position:]]), [*places, *range(position, len(text) + 1)]


def _parts_of_chain(text: str, harmless: re.Pattern[str]) -> Iterator[_Part]:
    cuts = [match.start() for match in _CHAIN.finditer(text)]
    position = 0
    if text.startswith("//"):
        stop = cuts[0] if cuts else len(text)
        userinfo = text[2:stop].partition("/")[0].rpartition("@")[0]
        if ":" in userinfo or _SECRET_PAIR.search(text, 0, stop):
            link = list(_parts_of_link("https", text, 2, stop, harmless))
            yield from link
            position = link[-1].shown_stop if link else 2
    while (scheme := _SCHEME.search(text, position)) is not None:
        number = bisect_left(cuts, scheme.end())
        stop = cuts[number] if number < len(cuts) else len(text)
        name = scheme[0].rstrip("/").rstrip(":").lower()
        position = scheme.end()
        for part in _parts_of_link(name, text, position, stop, harmless):
            yield part
            position = max(position, part.shown_stop)


def _parts_of_link(
    scheme: str, text: str, start: int, stop: int, harmless: re.Pattern[str]
) -> Iterator[_Part]:
    """The parts of one address up to `stop`, or to another address in its path."""
    host = start
    if (userinfo := _userinfo(scheme, text, start, stop)) is not None:
        end = start + len(userinfo)
        is_secret = _is_password(scheme, userinfo, harmless)
        is_reference = not harmless.sub("", userinfo.replace(":", ""))
        is_kept = not is_secret and (scheme in _NAME_IS_A_PLACE or is_reference or ":" in userinfo)
        if not is_kept:
            yield _Part(start, end, start, end + 1, is_secret)
        host = end + 1
    if scheme in _LOCAL:
        return
    inner = _SCHEME.search(text, host, stop)
    query = _first(text, "?", host, stop, is_sure=scheme in _OF_WEB)
    fragment = _first(text, "#", host, stop, is_sure=scheme in _OF_WEB)
    path_stop = min(query, fragment, inner.start() if inner else stop)
    for match in re.compile(r"[;&][^=;&/]*=[^;&/]*").finditer(text, host, path_stop):
        if not _is_harmless(match[0][1:], harmless):
            yield _Part(match.start() + 1, match.end(), match.start(), match.end())
    if path_stop == query < stop:
        fragment = fragment if fragment > query else stop
        yield from _parts_of_query(text, query, fragment, harmless)
    if min(query, fragment) <= path_stop and fragment < stop:
        content = text[fragment + 1 : stop]
        is_secret = bool(_LOOKS_LIKE_A_QUERY.search(harmless.sub("", content)))
        if harmless.sub("", content) or not content:
            yield _Part(fragment + 1, stop, fragment, stop, is_secret)


def _userinfo(scheme: str, text: str, start: int, stop: int) -> str | None:
    """Name and password before a host; an unencoded password is taken at its longest."""
    match = re.compile(r"[^/?#]*").match(text, start, stop)
    head = match[0] if match else ""
    if "@" not in head:
        # `user:pass/word@host`: no port, so a password.
        if _PORT.fullmatch(head) or scheme in _LOCAL:
            return None
        end = text.rfind("@", start, stop)
        return text[start:end] if end > start else None
    end = start + head.rindex("@")
    if ":" in text[start:end]:
        inner = _SCHEME.search(text, end, stop)
        in_path = re.compile(r"[^?#]*").match(text, end, inner.start() if inner else stop)
        end = text.rfind("@", end, in_path.end() if in_path else stop)
    return text[start:end]


def _is_password(scheme: str, userinfo: str, harmless: re.Pattern[str]) -> bool:
    name, colon, password = userinfo.partition(":")
    if colon:
        return bool(harmless.sub("", password))
    rest = harmless.sub("", name)
    if scheme in _OF_WEB:  # `https://TOKEN@host`
        return bool(rest)
    return scheme not in _NAME_IS_A_PLACE and len(rest) >= 20


def _first(text: str, sign: str, start: int, stop: int, *, is_sure: bool) -> int:
    """Start of a query or fragment; `stop` if there is none."""
    found = text.find(sign, start, stop)
    if found < 0 or not (is_sure or _LOOKS_LIKE_A_QUERY.search(text, found, stop)):
        return stop
    return found


def _parts_of_query(text: str, start: int, stop: int, harmless: re.Pattern[str]) -> Iterator[_Part]:
    """Runs of pairs that are not shown, in the query whose `?` is at `start`."""
    run: list[tuple[int, int]] = []
    is_after_another = False
    for match in re.compile(r"[^&;]*(?:[&;]|$)").finditer(text[:stop], start + 1):
        if match.start() == stop:
            break
        pair = match[0].rstrip("&;")
        span = (match.start(), match.start() + len(pair))
        if _is_harmless(pair, harmless):
            if run:
                # The separator before is removed too, or else the one after.
                first, last = run[0][0], run[-1][1]
                shift = int(is_after_another)
                yield _Part(first, last, first - shift, last + 1 - shift)
            run, is_after_another = [], True
        else:
            run.append(span)
    if run:
        yield _Part(run[0][0], run[-1][1], run[0][0] - 1, stop)


def _is_harmless(pair: str, harmless: re.Pattern[str]) -> bool:
    key, equals, value = pair.partition("=")
    if not harmless.sub("", value if equals else pair):  # nothing, or a reference
        return bool(value and _KEY.fullmatch(key)) if equals else True
    return key.lower() in _HARMLESS_KEYS and bool(_HARMLESS_VALUE.fullmatch(value))
