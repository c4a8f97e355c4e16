from typing import Any

lib: object
ffi: Any
