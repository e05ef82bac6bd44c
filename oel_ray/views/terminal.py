"""Make text safe for a terminal. Any process; pure."""

import re

from rich.text import Text

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def plain(text: str, style: str = "") -> Text:
    """What a game or a model wrote, as text only."""
    return Text(_CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text), style)
