"""Programs without the texts that only describe them."""

from __future__ import annotations

import ast


def code_of(source: str) -> bytes:
    """Return a program without its docstrings and comments, for a digest.

    Args:
        source: The program's text.
    """
    return ast.dump(without_docstrings(source)).encode()


def without_docstrings(source: str) -> ast.Module:
    r"""Return the syntax tree of a program without the texts that only describe it.

    >>> ast.unparse(without_docstrings('def f(x):\n    "Say it."\n    return x  # why'))
    'def f(x):\n    return x'
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            statements = getattr(node, field, None)
            if isinstance(statements, list):
                setattr(node, field, [statement for statement in statements if not _is_text(statement)])
    return tree


def _is_text(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )
