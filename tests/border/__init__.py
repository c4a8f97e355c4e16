"""The border of the model: each of the three doors (daemon, tool, library) in each world that a host may be."""
