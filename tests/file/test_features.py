"""A sample of `make features`: images with everything the format has, ours and QEMU's to change in turns."""

from pathlib import Path
from random import Random

import pytest

from tests.features.life import Life
from tests.features.qemu import Qemu
from tests.features.shape import FEATURES, draw_shape
from tests.oracle import peers


@pytest.mark.sample(2)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("feature", FEATURES)
def test_all_agree_on_what_each_made_of_an_image(tmp_path: Path, feature: str, seed: int) -> None:
    draw = Random(f"{feature} {seed} short")
    qemus = [Qemu(str(Path(img).parent) if "/" in img else "") for img in peers()]
    Life(tmp_path, draw_shape(draw, feature), draw, qemus).lead(turns=2, nsteps=30)
