"""Means and standard errors."""

import numpy as np
import pytest

from ivideo.evaluation import averages


def test_small_standard_error_is_that_of_numpy():
    values = list(np.random.default_rng(0).normal(size=20))
    assert averages.mean(values) == pytest.approx(np.mean(values))
    assert averages.standard_error(values) == pytest.approx(np.std(values, ddof=1) / np.sqrt(20))
    # of a share p: √(p (1 - p) / (n - 1))
    assert averages.standard_error([True] * 15 + [False] * 5) == pytest.approx(np.sqrt(0.75 * 0.25 / 19))
    assert averages.standard_error([True] * 15) == 0


def test_small_too_few_values():
    assert averages.mean([]) is None and averages.standard_error([]) is None
    assert averages.mean([2.0]) == 2 and averages.standard_error([2.0]) is None


def test_small_text():
    assert averages.text(0.875, 0.0341, digits=1, percent=True) == "87.5% ± 3.4"
    assert averages.text(0.9512, 0.0021, digits=3) == "0.951 ± 0.002"
    assert averages.text(1.0, None, digits=2) == "1.00"
    assert averages.text(None, None, digits=2) == "–"
