"""Text for the small trainer: books read from what the user has, unwrapped into paragraphs and split by chapters.

The project ships no corpus. The shipped checkpoint learned from Jane Austen's six novels, which Debian packages for R;
no R is needed, because the package's data file is a few compressed vectors of lines:

    apt-get download r-cran-janeaustenr && dpkg -x r-cran-janeaustenr_*.deb austen
    python main.py train --corpus austen
"""

import dataclasses
import re
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

from sarathi_jax.config import ConfigError

_R_HEADER = b"X\n"
_R_STRINGS, _R_STRING = 16, 9

_HEADING = re.compile(r"(?:CHAPTER|Chapter|VOLUME|Volume|BOOK|PART|LETTER)\s+(?:[IVXLC]+|\d+)\.?")


@dataclasses.dataclass(frozen=True)
class Book:
    """A text as a list of chapters; each chapter is a document of its own to the model.

    Attributes:
      title: first line of the text, or the name of its file.
      chapters: paragraphs joined by single newlines, heading first.
    """

    title: str
    chapters: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Split:
    """Documents to learn from and documents never seen in training, tokenizer included."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


def read_books(path: Path) -> list[Book]:
    """Reads every book under a path.

    Args:
      path: a text file (UTF-8), a lazy-load database of R (``.rdb``) whose values are vectors of lines, or a folder
        searched for both.

    Returns:
      The books, ordered by file name, then by their place in the file.

    Raises:
      ConfigError: nothing readable lies there.
    """
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    # A package of R keeps its code in R/*.rdb and its help in help/*.rdb; only data/ holds text.
    texts = [p for p in files if p.suffix == ".txt" or (p.suffix == ".rdb" and p.parent.name == "data")]
    if not path.is_dir():
        texts = files
    books = []
    for file in texts:
        if not file.is_file():
            raise ConfigError(f"the corpus {file} does not exist")
        if file.suffix == ".rdb":
            books += [make_book(lines[0] if lines else file.stem, lines) for lines in read_r_lines(file.read_bytes())]
        else:
            books.append(make_book(file.stem, file.read_text(encoding="utf-8").splitlines()))
    books = [book for book in books if book.chapters]
    if not books:
        raise ConfigError(
            f"{path} holds no text: give a .txt file, or a folder with .txt files or with an unpacked "
            "r-cran-janeaustenr (apt-get download r-cran-janeaustenr; dpkg -x r-cran-janeaustenr_*.deb FOLDER)"
        )
    return books


def read_r_lines(blob: bytes) -> Iterable[list[str]]:
    """Character vectors of a lazy-load database of R (``R Internals``, section 1.8, serialisation format XDR 2 or 3).

    Args:
      blob: the ``.rdb`` file: for each value its length as a big-endian u32, then a zlib stream.

    Yields:
      The lines of each value that is a plain character vector; other values are skipped.

    Raises:
      ConfigError: the file is cut short or is not such a database.
    """
    while blob:
        stream = zlib.decompressobj()
        try:
            data = stream.decompress(blob[4:])
        except zlib.error as error:
            raise ConfigError(f"not a zlib-compressed lazy-load database of R: {error}") from error
        if not stream.eof:
            raise ConfigError("the lazy-load database of R is cut short: unpack the package again")
        blob = stream.unused_data
        if not data.startswith(_R_HEADER):
            raise ConfigError("the lazy-load database of R does not use the XDR serialisation")
        (version,) = struct.unpack_from(">i", data, 2)
        at = 14
        if version == 3:  # names the encoding of strings that carry no mark
            at += 4 + struct.unpack_from(">i", data, at)[0]
        kind, count = struct.unpack_from(">ii", data, at)
        if kind & 0xFF == _R_STRINGS:
            yield _read_strings(data, at + 8, count)


def _read_strings(data: bytes, at: int, count: int) -> list[str]:
    lines = []
    for _ in range(count):
        flags, length = struct.unpack_from(">ii", data, at)
        if flags & 0xFF != _R_STRING:
            raise ConfigError("a character vector of R holds something that is not a string")
        at += 8
        # A missing value has length -1.
        lines.append(data[at : at + max(length, 0)].decode("utf-8", errors="replace"))
        at += max(length, 0)
    return lines


def unwrap(lines: Iterable[str]) -> list[str]:
    """Joins hard-wrapped lines into paragraphs; blank lines separate them.

    Underscores that mark italics go. A line that ends in a dash or hyphen is joined without a space. Case, quotes and
    spelling stay as they are.
    """
    paragraphs, current = [], ""
    for raw in [*lines, ""]:
        line = " ".join(raw.replace("_", "").split())
        if line:
            current += ("" if not current or current.endswith("-") else " ") + line
        elif current:
            paragraphs.append(current)
            current = ""
    return paragraphs


def make_book(title: str, lines: Iterable[str]) -> Book:
    """Cuts a text into chapters at its headings; what stands before the first heading is dropped.

    A heading is a paragraph of its own such as ``CHAPTER IV`` or ``Chapter 4``. A text without headings is one chapter.
    """
    paragraphs = unwrap(lines)
    starts = [i for i, paragraph in enumerate(paragraphs) if _HEADING.fullmatch(paragraph)]
    if not starts:
        return Book(title.strip(), ("\n".join(paragraphs),) if paragraphs else ())
    ends = [*starts[1:], len(paragraphs)]
    # Two headings in a row (a volume and its first chapter) open one chapter: short pieces join the next one.
    chapters, pending = [], []
    for start, end in zip(starts, ends, strict=True):
        pending += paragraphs[start:end]
        if end - start > 1:
            chapters.append("\n".join(pending))
            pending = []
    return Book(title.strip(), tuple(chapters))


def split_books(books: Iterable[Book], held_out_fraction: float) -> Split:
    """Holds out the end of every book: whole chapters, at least the given share of its characters.

    A book of a single chapter is cut at a paragraph instead.

    Args:
      books: in order.
      held_out_fraction: in (0, 1).
    """
    train, held_out = [], []
    for book in books:
        pieces, joiner = list(book.chapters), None
        if len(pieces) == 1:
            pieces, joiner = pieces[0].split("\n"), "\n"
        wanted, cut = held_out_fraction * sum(map(len, pieces)), len(pieces)
        while cut > 1 and sum(map(len, pieces[cut:])) < wanted:
            cut -= 1
        for side, part in ((train, pieces[:cut]), (held_out, pieces[cut:])):
            if part:
                side += [joiner.join(part)] if joiner else part
    return Split(tuple(train), tuple(held_out))
