"""Whoever changes the C sees here which mutants of the simulator have to follow."""

import pytest

from tests.sim.build import ROOT
from tests.sim.mutant import MUTANTS, Mutant
from tests.sim.patch import PATCHES


@pytest.mark.parametrize("mutant", [one for one in MUTANTS if one.edit], ids=lambda mutant: mutant.name)
def test_a_mutant_finds_what_it_breaks(mutant: Mutant) -> None:
    assert mutant.edit
    assert (ROOT / mutant.edit.file).read_text().count(mutant.edit.old) == 1
    assert mutant.edit.new != mutant.edit.old


def test_a_mutant_without_an_edit_is_a_patch_of_the_engine() -> None:
    assert {one.name for one in MUTANTS if not one.edit} == {patch.__name__ for patch in PATCHES}
