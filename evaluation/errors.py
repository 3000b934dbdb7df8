"""Every error that the evaluation raises on purpose."""


class EvaluationError(Exception):
    """Base class of all errors raised by `evaluation`."""


class QuestionError(EvaluationError):
    """A file of questions that cannot be read; the message names the file and the line."""


class PlotError(EvaluationError):
    """A plot that cannot be drawn or written."""


class TextError(EvaluationError):
    """A text that cannot be read or measured; the message names it."""


class GridError(EvaluationError):
    """An activation to be compared that is none."""
