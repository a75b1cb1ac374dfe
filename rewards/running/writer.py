"""Writes messages to another process. A separate thread writes them, so that the caller never waits.

If both processes wrote in the thread that also reads, both could wait for the other to read, for ever.

Tested in tests/rewards/running/test_async_pool.py.
"""

import queue
import threading
from multiprocessing.connection import Connection


class Writer:
    """Sends messages through a connection in the order of the calls of `put`. `put` never waits."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="writer", daemon=True)
        self._thread.start()

    def put(self, message: bytes) -> None:
        """Queues a message. If the other process has ended, the message is lost; whoever reads notices the end."""
        self._messages.put(message)

    def close(self) -> None:
        """Ends the thread after the messages that are queued. The other process must read them, or must have ended."""
        self._messages.put(None)
        self._thread.join()

    def _write(self) -> None:
        while (message := self._messages.get()) is not None:
            try:
                self._connection.send_bytes(message)
            except OSError:
                return
