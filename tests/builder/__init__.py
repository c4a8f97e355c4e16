"""qcow2 images written byte by byte from the format specification, sharing no line with the engine under test.

A `Recipe` says what the guest sees and where it lies; `build` writes the file and returns a `Built`, whose methods
damage single fields on purpose. Offsets are bytes, clusters are numbers; every integer on the disk is big-endian.
"""

from tests.builder.built import Built
from tests.builder.recipe import Cluster, Recipe
from tests.builder.writer import build

__all__ = ["Built", "Cluster", "Recipe", "build"]
