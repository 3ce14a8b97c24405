"""Shows a docstring's ``Example:`` as code.

Griffe knows the section ``Examples:``; what stands under ``Example:``, as this project writes it, would be Markdown, in
which ``>>>`` is a quotation.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_HEAD = re.compile(r"^(\s*)Example:[ \t]*$", re.MULTILINE)


class ExampleSections(griffe.Extension):
    """Renames the section in every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rename the section in one object's docstring."""
        if obj.docstring is not None:
            obj.docstring.value = _HEAD.sub(r"\1Examples:", obj.docstring.value)
