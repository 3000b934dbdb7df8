"""Settings of the HTTP server. The engine has its own: `engine.EngineConfig`."""

from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

LogLevel = Literal["critical", "error", "warning", "info", "debug"]


class ServerSettings(BaseSettings):
    """What `serve` is told besides the engine's configuration.

    Each field may also come from the environment: `SILUETTE_PORT=9000` sets `port`. Arguments take precedence.
    """

    model_config = SettingsConfigDict(env_prefix="SILUETTE_", frozen=True, use_attribute_docstrings=True)

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0 lets the system choose one."""
    served_model_name: str | None = None
    """Name of the model in the API; the model's own name if left out."""
    log_level: LogLevel = "info"
    """Least severe messages that are logged."""
    access_log: bool = False
    """Log a line for each HTTP request."""
    drain_delay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Seconds after SIGTERM in which new requests are still taken, so that balancers can notice that this server is no
    longer ready before it refuses anything."""
    shutdown_timeout: float = Field(default=30.0, ge=0, allow_inf_nan=False)
    """Seconds that running requests get to finish, from the end of the drain delay, before they are aborted."""
    max_body_bytes: int = Field(default=4 * 1024 * 1024, ge=1024)
    """Longest request body; a longer one is answered with 413."""
    max_prompts: int = Field(default=128, ge=1)
    """Most prompts in one completion request."""
    cors_origins: list[str] = []
    """Origins whose pages may call the API from a browser; none by default."""
    otlp_endpoint: str | None = Field(default=None, pattern="^https?://")
    """Address of an OpenTelemetry collector (OTLP over HTTP) that gets a trace of each request; none by default."""
