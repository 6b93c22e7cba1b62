"""The model of time holds what docs/plan.md says of it."""

import published
import pytest
from conftest import ROOT

PAGE = (ROOT / "docs/plan.md").read_text()


def test_a_step_of_resnet_is_within_what_the_page_says():
    errors = {row.what: abs(row.error) for row in published.resnet()}
    pods_of_flax = [what for what in errors if what.startswith("Flax, v") and "-32" in what]
    assert max(errors[what] for what in errors if what not in pods_of_flax) < 0.35
    assert max(errors[what] for what in pods_of_flax) < 0.40  # evaluations and checkpoints too
    assert "within 35 %" in PAGE


def test_scaling_over_slices_is_within_what_the_page_says():
    errors = [row.error for row in published.maxtext()]
    assert len(errors) == 20
    assert max(map(abs, errors)) < 0.065
    assert (sum(error**2 for error in errors) / 20) ** 0.5 < 0.03
    assert "3 % on average and 6.5 % at most" in PAGE


@pytest.mark.parametrize("rows", [published.resnet, published.maxtext])
def test_the_tables_of_the_page_are_those_of_the_model(rows):
    for line in published.table(rows()).splitlines():
        assert line in PAGE
