"""Why a run ends by its own decision, or has to begin again from what it has saved."""

GO_ON = "go on with --resume (a curation: with the same command)"  # what helps once the cause is mended


class Stop(RuntimeError):
    """The run must not go on; the message says why and what would help. What it finished is kept.

    `saves` is True where this iteration has changed no weight yet, so that a checkpoint can still be made.
    """

    def __init__(self, message: str, *, saves: bool) -> None:
        super().__init__(message)
        self.saves = saves


class WorkerDied(RuntimeError):
    """A process of the run died, or gave no sign of life for too long. Another one can do what it was doing."""


class SourceDied(WorkerDied):
    """The process that died is not the one that was asked, but one whose answer that one was to work on."""
