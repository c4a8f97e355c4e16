"""How long tests wait for what will come. Nothing is measured by it: it only ends a test that would hang."""

TIMEOUT = 300  # seconds; ten times what a machine needs that has ten times too much to do
