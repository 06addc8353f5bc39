"""Where the training command prints. Names and cells of a table are printed as they are, whatever they look like."""

import re
from typing import Any

from rich.console import Console
from rich.text import Text

# Line breaks too: a name stays on its line.
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class LiteralConsole(Console):
    """A Console for which strings have no markup, emoji codes or control characters; those are printed as escapes."""

    def __init__(self) -> None:
        super().__init__(highlight=False, soft_wrap=True, markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(CONTROL.sub(lambda found: repr(found[0])[1:-1], text), **options)


console = LiteralConsole()
