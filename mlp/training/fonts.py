"""Text in any script on figures, drawn as it is."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache

from matplotlib import font_manager, rc_context
from matplotlib.ft2font import FT2Font

REPLACEMENT = "\\u{:04x}"
# Fonts of boxes for any character.
LAST_RESORT = "Last Resort"


@cache
def _glyphs(path: str) -> frozenset[int]:
    return frozenset(FT2Font(path).get_charmap())


def families(texts: Iterable[str]) -> list[str]:
    """Font families that together have the characters of some texts, as far as the machine has any: the default first.

    Args:
        texts: The texts.
    """
    default = font_manager.FontProperties().get_family()
    needed = {ord(character) for text in texts for character in text}
    found = list(default)
    needed -= _glyphs(font_manager.findfont(font_manager.FontProperties(family=default)))
    for font in font_manager.fontManager.ttflist if needed else ():
        if not font.name.startswith(LAST_RESORT) and (covered := needed & _glyphs(font.fname)):
            found.append(font.name)
            needed -= covered
    return found


def drawable(text: str) -> str:
    """The text as matplotlib has to be given it: without formulas, and with characters that no font has as \\uXXXX."""
    missing = {ord(character) for character in text}
    for family in families([text]):
        missing -= _glyphs(font_manager.findfont(font_manager.FontProperties(family=[family])))
    drawn = "".join(REPLACEMENT.format(ord(each)) if ord(each) in missing else each for each in text)
    return drawn.replace("$", r"\$")


@contextmanager
def drawing(texts: Iterable[str]) -> Iterator[None]:
    """Figures made inside the `with` block have fonts for these texts."""
    with rc_context({"font.family": families(texts)}):
        yield
