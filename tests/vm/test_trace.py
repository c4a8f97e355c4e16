"""The laws on the production data plane: what daemons did for a real guest is explored (`make survey` does more)."""

from pathlib import Path

import pytest

from tests.crash.survey import Survey
from tests.vm.conftest import Boot, Serve
from tests.vm.recording import CLUSTER_SECTORS, record


@pytest.mark.sample(8, of="guests")
def test_no_death_during_a_guests_work_breaks_a_law(boot: Boot, serve: Serve, tmp_path: Path) -> None:
    for name, recorded in record(boot, serve, tmp_path, mib=32, writes=24).items():
        survey = Survey(recorded, CLUSTER_SECTORS, samples=1)
        survey.visit(16)
        print(f"{name}: {recorded.requests} requests, {len(recorded.journal)} events, {survey.states} states")
        assert recorded.requests > 60
        assert survey.states > 2 * survey.points
