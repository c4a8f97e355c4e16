"""How a connection ends before its time."""


class ClientGone(Exception):
    """The client has left, or was too slow: nobody is there to be told anything."""


class ProtocolViolation(Exception):
    """The client broke the protocol where no answer is possible; one line says how. Its connection ends."""
