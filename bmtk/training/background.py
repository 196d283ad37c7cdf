"""Saving beside training: a thread copies the state and writes it, while the next step is already computed."""

import threading
from collections.abc import Callable


class BackgroundSaver:
    """Does one save at a time.

    A step changes weights and optimizer state only at its end, so the copy is made during its forward and backward
    passes; whoever changes them calls `wait_for_copy` first.
    """

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None
        self.is_copied = threading.Event()
        self.is_copied.set()

    def start(self, copy: Callable[[], object], write: Callable[[], object]) -> None:
        """Call `copy`, and then `write`, in a thread, when the save before has ended.  Raises: the error of that."""
        self.finish()
        self.is_copied.clear()

        def work() -> None:
            try:
                try:
                    copy()
                finally:
                    self.is_copied.set()
                write()
            except BaseException as error:  # raised again by `finish`
                self.error = error

        # The process may end without it: then there is an error that ends it at once.
        self.thread = threading.Thread(target=work, name="saving", daemon=True)
        self.thread.start()

    def wait_for_copy(self) -> None:
        """Return when weights and optimizer state may be changed."""
        self.is_copied.wait()

    @property
    def has_failed(self) -> bool:
        """Whether `finish` would raise an error, as far as that is known."""
        return self.error is not None

    def finish(self) -> None:
        """Wait for the save that is being written, if there is one.  Raises: its error."""
        if self.thread:
            self.thread.join()
        self.thread = None
        error, self.error = self.error, None
        if error:
            raise error
