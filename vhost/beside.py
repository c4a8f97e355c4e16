"""A look at the image beside the guest's requests, for a thread that has to know what it finds."""

from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from qcow2.driver.task import Task
from ring.thread import new_future
from vhost.device import Device
from vhost.disk import ImageBackend

T = TypeVar("T")


def beside(device: Device, backend: ImageBackend, look: Coroutine[Any, Any, T]) -> T:
    """Await *look* on the worker, which holds the image meanwhile -> what it gives. Raises: what it raises."""
    outcome: Future[T] = new_future()

    def end(task: Task) -> None:
        error = task.take_error()
        if error is None:
            outcome.set_result(task.result)
        else:
            outcome.set_exception(error)

    device.worker.call(lambda: backend.run(look, end))
    return device.worker.wait(outcome)
