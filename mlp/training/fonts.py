"""Text in any script on figures."""

from collections.abc import Iterable
from functools import cache

from matplotlib import font_manager
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
    """The text, with characters that no font of the machine has as \\uXXXX."""
    missing = {ord(character) for character in text}
    for family in families([text]):
        missing -= _glyphs(font_manager.findfont(font_manager.FontProperties(family=[family])))
    return "".join(REPLACEMENT.format(ord(each)) if ord(each) in missing else each for each in text)
