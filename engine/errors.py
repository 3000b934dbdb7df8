"""Every error that the engine raises on purpose. The server maps these classes to HTTP status codes in one table."""


class EngineError(Exception):
    """Base class of all errors raised by `engine`."""


class InvalidRequest(EngineError):
    """A request that can never succeed as it is.

    `field` is the dotted name of the offending field as a client spells it (`"activation.p"`), or None when the request
    as a whole is at fault.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field


class ContextLengthExceeded(InvalidRequest):
    """The prompt, or prompt plus `max_tokens`, does not fit the model's context."""


class UntunedActivation(InvalidRequest):
    """The checkpoint was not tuned for the requested activation and the engine does not allow untuned ones."""


class ModelLoadError(EngineError):
    """A checkpoint that cannot be loaded: files missing, malformed or inconsistent."""


class UnsupportedArchitecture(ModelLoadError):
    """The checkpoint's architecture, or a feature of it, is not implemented. The message says which ones are."""


class EngineOverloaded(EngineError):
    """The waiting queue is full. `retry_after` is a hint in seconds."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineStopped(EngineError):
    """The engine is shut down, shutting down or has died; it takes no requests."""


class InvalidConfig(EngineError):
    """An engine configuration that cannot work with this model or machine."""
