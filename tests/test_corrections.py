"""What docs/corrections.md says of the sources' formulas and figures, where nothing else shows it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from wellcond.lab.reproduction.recipe import find_recipe


@pytest.mark.parametrize("t", [0.0, 0.3, 0.6, 1.0])
def test_the_second_derivative_of_cross_entropy_has_t_and_not_its_square(t: float) -> None:
    f = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    loss = -t * f.log() - (1 - t) * (1 - f).log()
    (slope,) = torch.autograd.grad(loss, f, create_graph=True)
    (second,) = torch.autograd.grad(slope, f)
    corrected = (0.3**2 - 2 * t * 0.3 + t) / (0.3 * 0.7) ** 2
    printed = (0.3**2 - 2 * t * 0.3 + t**2) / (0.3 * 0.7) ** 2
    assert float(second) == pytest.approx(corrected, rel=1e-12)
    assert (printed == pytest.approx(corrected)) == (t in (0.0, 1.0))


def test_the_projection_takes_the_mean_out_of_the_frobenius_norm_and_not_of_the_2_norm() -> None:
    """Thesis 4.10, with a symmetric matrix for the Hessian."""
    size = 6
    hessian = torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hessian = hessian + hessian.T
    e = torch.full((size, 1), size**-0.5, dtype=torch.float64)
    projected = hessian - e @ (e.T @ hessian)

    def squared(matrix: torch.Tensor, kind: Any) -> float:
        return float(torch.linalg.matrix_norm(matrix, kind)) ** 2

    assert squared(projected, "fro") == pytest.approx(squared(hessian, "fro") - squared(e.T @ hessian, "fro"))
    assert squared(projected, 2) <= squared(hessian, 2)
    assert squared(projected, 2) != pytest.approx(squared(hessian, 2) - squared(e.T @ hessian, 2), rel=0.01)


def test_normalized_features_sum_to_their_shift() -> None:
    """Slides: ĥᵀĥ = M(γ² + β²), and the sum is Mβ."""
    h = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out = 0.7 * (h - h.mean()) / h.std(correction=0) + 0.2
    assert float(out @ out) == pytest.approx(1000 * (0.7**2 + 0.2**2))
    assert float(out.sum()) == pytest.approx(1000 * 0.2)


def test_figures_that_do_not_fit_their_text() -> None:
    (panel,) = (panel for panel in find_recipe("3.2").panels if panel.name == "m = 2")
    assert panel.paper["BSR"][0] - panel.paper["EMA"][0] == pytest.approx(6.54)
    (panel,) = (panel for panel in find_recipe("IBN-Net").panels if panel.name == "DenseNet-169")
    assert panel.paper["BN"][0] - panel.paper["IBN-a"][0] == pytest.approx(0.77)
