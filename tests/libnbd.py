"""libnbd's Python binding for our programs: the host's, which no virtual environment sees."""

import sysconfig
from pathlib import Path

import pytest

PLACE = Path("/usr/lib/python3/dist-packages")
FILES = [PLACE / "nbd.py", PLACE / f"libnbdmod{sysconfig.get_config_var('EXT_SUFFIX')}"]
needs_binding = pytest.mark.skipif(
    not all(file.exists() for file in FILES), reason="no python3-libnbd for this Python here"
)


@pytest.fixture
def binding(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let programs that are started from here on, and this process, find it, and nothing else of the host's."""
    directory = tmp_path_factory.mktemp("binding")
    for file in FILES:
        (directory / file.name).symlink_to(file)
    monkeypatch.setenv("PYTHONPATH", str(directory))
    monkeypatch.syspath_prepend(directory)
