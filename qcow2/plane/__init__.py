"""What moves bytes, in C, and its typed faces: cached tables, what a request may do at once, the link log."""
