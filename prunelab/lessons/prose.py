"""The little markup that a question or a verdict may have."""

from __future__ import annotations

import html
import re


def prose(text: str) -> str:
    """Plain text as HTML: special characters escaped, what stands between backticks set as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
