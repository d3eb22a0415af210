"""A toy corpus with structure to learn: sentences from a small grammar, in chapters."""

from pathlib import Path

import numpy as np

_NAMES = ("Anna", "Tom", "the old captain", "her sister", "Mr. Gray")
_VERBS = ("walked to", "wrote to", "was fond of", "spoke about", "laughed at")
_PLACES = ("the house", "the garden", "a letter", "the village", "the sea", "London")


def write_book(folder: Path, num_chapters: int = 8, sentences: int = 60) -> Path:
    """Writes ``book.txt``, hard-wrapped as old e-texts are, and returns its folder."""
    draw = np.random.default_rng(0)
    lines = ["A BOOK", ""]
    for chapter in range(1, num_chapters + 1):
        lines += [f"CHAPTER {chapter}", ""]
        for sentence in range(sentences):
            name, verb, place = (str(draw.choice(words)) for words in (_NAMES, _VERBS, _PLACES))
            lines += [f"{name[0].upper()}{name[1:]} {verb} {place},", "and was happy."]
            if sentence % 4 == 3:
                lines.append("")
        lines.append("")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "book.txt").write_text("\n".join(lines))
    return folder
