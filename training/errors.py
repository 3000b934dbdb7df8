"""Every error that training raises on purpose. The command line prints them without a traceback."""

from pathlib import Path


class TrainingError(Exception):
    """Base class of all errors raised by `training`."""


class TextError(TrainingError):
    """Training text that cannot be used. The message begins with the file and, where there is one, the line."""

    def __init__(self, message: str, path: Path | None = None, line: int | None = None) -> None:
        place = "" if path is None else f"{path}: " if line is None else f"{path}:{line}: "
        super().__init__(place + message)
        self.path = path
        self.line = line


class GenerationError(TrainingError):
    """The model cannot write training text: no usable chat template, or nothing usable in many batches."""


class PackageError(TrainingError):
    """A Debian package that cannot be fetched, or is not what it should be."""


class CorpusError(TrainingError):
    """A corpus that cannot be built, or whose held-out text occurs in its training text."""


class InvalidTuneConfig(TrainingError):
    """A setting that is out of range or contradicts another.

    Attributes:
        field: Name of the setting.
    """

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.field = field


class UnsupportedModel(TrainingError):
    """A model that stochastic activations cannot be trained into."""


class ResumeError(TrainingError):
    """Saved state that does not belong to this run."""


class Diverged(TrainingError):
    """A loss or gradient that is not finite."""
