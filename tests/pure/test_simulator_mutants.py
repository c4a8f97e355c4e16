"""Whoever changes the C sees here which mutants of the simulator have to follow."""

import pytest

from tests.sim.build import ROOT
from tests.sim.mutant import MUTANTS, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_finds_what_it_breaks(mutant: Mutant) -> None:
    assert (ROOT / mutant.edit.file).read_text().count(mutant.edit.old) == 1
    assert mutant.edit.new != mutant.edit.old
