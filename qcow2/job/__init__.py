"""Long work over images: coroutines that whoever has a driver can run, the tool as well as a daemon."""
