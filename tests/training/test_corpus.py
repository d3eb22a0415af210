import struct
import zlib

import pytest

from sarathi_jax.config import ConfigError
from sarathi_jax.training.corpus import Book, make_book, read_books, read_r_lines, split_books, unwrap
from tests.training.texts import write_book


def r_value(lines, kind=16, version=3):
    """A character vector as R serialises it into a lazy-load database."""
    encoding = struct.pack(">i", 5) + b"UTF-8" if version == 3 else b""
    strings = b"".join(struct.pack(">ii", 0x00040009, len(s.encode())) + s.encode() for s in lines)
    data = b"X\n" + struct.pack(">iii", version, 0x040201, 0x030500) + encoding
    data += struct.pack(">ii", kind, len(lines)) + strings
    return struct.pack(">I", len(data)) + zlib.compress(data)


def test_hard_wrapped_lines_become_paragraphs():
    lines = [
        "  It was a _very_ fine",
        "day, and the drawing-",
        "room was full--",
        "quite full.",
        "",
        "",
        '"Oh!" she said.',
    ]
    assert unwrap(lines) == ["It was a very fine day, and the drawing-room was full--quite full.", '"Oh!" she said.']


def test_chapters_are_cut_at_headings_and_front_matter_is_dropped():
    book = make_book("T", ["T", "", "by me", "", "VOLUME I", "", "CHAPTER I", "", "One.", "", "CHAPTER II", "", "Two."])
    assert book.chapters == ("VOLUME I\nCHAPTER I\nOne.", "CHAPTER II\nTwo.")


def test_a_heading_inside_a_sentence_is_no_heading():
    assert make_book("T", ["See CHAPTER I for more.", "", "Fine."]).chapters == ("See CHAPTER I for more.\nFine.",)


@pytest.mark.parametrize("version", [2, 3])
def test_reads_the_lines_of_an_r_database(version):
    blob = r_value(["EMMA", "", "caf\u00e9"], version=version) + r_value(["x"], kind=13) + r_value(["two"])
    assert list(read_r_lines(blob)) == [["EMMA", "", "caf\u00e9"], ["two"]]


@pytest.mark.parametrize("blob", [r_value(["EMMA"])[:-5], b"\0\0\0\4nothing compressed"])
def test_a_broken_r_database_is_refused(blob):
    with pytest.raises(ConfigError, match="database of R"):
        list(read_r_lines(blob))


def test_finds_the_database_inside_an_unpacked_package(tmp_path):
    package = tmp_path / "usr/lib/R/site-library/janeaustenr"
    for part in ("data", "R", "help"):
        (package / part).mkdir(parents=True)
        (package / part / "x.rdb").write_bytes(r_value(["EMMA", "", "CHAPTER I", "", f"From {part}."]))
    assert read_books(tmp_path) == [Book("EMMA", ("CHAPTER I\nFrom data.",))]


def test_a_path_without_text_says_how_to_get_one(tmp_path):
    with pytest.raises(ConfigError, match=r"r-cran-janeaustenr"):
        read_books(tmp_path)
    with pytest.raises(ConfigError, match="does not exist"):
        read_books(tmp_path / "missing.txt")


def test_whole_chapters_at_the_end_of_every_book_are_held_out(tmp_path):
    books = read_books(write_book(tmp_path))
    split = split_books(books, 0.2)
    assert split.train + split.held_out == books[0].chapters
    assert len(split.held_out) == 2
    whole = split_books([Book("one", ("a" * 50 + "\n" + "b" * 40 + "\n" + "c" * 10,))], 0.05)
    assert whole.held_out == ("c" * 10,)
    assert whole.train[0].endswith("b")
