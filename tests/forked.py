"""A child of the test's own process, which must not go on with the test as well."""

import os
import traceback
from collections.abc import Callable
from typing import NoReturn

RAISED = 99  # the status of one that raises, whatever it does


def fork(live: Callable[[], int]) -> int:
    """The pid of a child that ends with the status that *live* returns, or as that ends it."""
    child = os.fork()
    if not child:
        _end_with(live)
    return child


def _end_with(live: Callable[[], int]) -> NoReturn:
    status = RAISED
    try:
        status = live()
    except BaseException:  # told, and no test's to catch
        traceback.print_exc()
    finally:
        os._exit(status)


def status_of(child: int) -> int:
    """How *child* ends; -n: by signal n."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
