"""Tiny texts, tables and frozen features, of which something can be learned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

PHRASE = "The quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. "


def write_text(root: Path) -> Path:
    (root / "book.txt").write_text(PHRASE * 40)
    return root / "book.txt"


def write_csv(root: Path, rows: int = 200) -> Path:
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=rows), generator.integers(3, size=rows)
    y = 2 * a + b + 0.1 * generator.normal(size=rows)
    lines = ["a,word,gap,size,kind"]
    for row in range(rows):
        gap = "" if row % 7 == 0 else f"{a[row] + 5:.3f}"
        lines.append(f"{a[row]:.4f},{'uvw'[b[row]]},{gap},{y[row]:.4f},{'high' if y[row] > 1 else 'low'}")
    (root / "table.csv").write_text("\n".join(lines) + "\n")
    return root / "table.csv"


def write_parquet_table(root: Path, rows: int = 200) -> Path:
    x = np.random.default_rng(0).normal(size=(rows, 2))
    pq.write_table(pa.table({"a": x[:, 0], "b": x[:, 1], "y": (x.sum(1) > 0).astype(int)}), root / "table.parquet")
    return root / "table.parquet"


def write_array(root: Path, rows: int = 200) -> Path:
    x = np.random.default_rng(0).normal(size=(rows, 4))
    np.save(root / "table.npy", np.column_stack([x, x @ [1.0, -2.0, 0.5, 0.0] + 100]))
    return root / "table.npy"


def write_features(root: Path, rows: int = 200, classes: int = 7) -> Path:
    generator = np.random.default_rng(0)
    y = generator.integers(classes, size=rows)
    x = 2 * np.eye(classes)[y] + 0.5 * generator.normal(size=(rows, classes))
    np.savez(root / "features.npz", x=x, y=y, x_test=x[:50] + 0.01, y_test=y[:50])
    return root / "features.npz"
