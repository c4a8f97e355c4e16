"""The formats an image may have; which one is said by the user or the overlay, and never guessed."""

FORMATS = ("qcow2", "raw")
