"""Client for Siluette, the text-generation server whose requests choose how the model is activated.

```
from siluette_client import Activation, Client

with Client() as client:
    answer = client.generate("Once upon a time", n=3, temperature=0, activation=Activation.stochastic(0.8))
    print(answer.texts, answer.activation, answer.seed)
```
"""

from siluette_client.activation import Activation, ActivationLike, Mode, Scope
from siluette_client.async_client import AsyncClient
from siluette_client.client import Client
from siluette_client.configuration import __version__
from siluette_client.errors import (
    APIError,
    BadRequest,
    ConnectionFailed,
    ContextLengthExceeded,
    InvalidAnswer,
    NotFound,
    Overloaded,
    RequestTimeout,
    ServerError,
    SiluetteError,
    StreamFailed,
    StreamInterrupted,
    TransportError,
    Unavailable,
    UntunedActivation,
)
from siluette_client.requests import CallOptions, Message, Messages, Options, Prompt
from siluette_client.retry import RetryPolicy
from siluette_client.sparsity import Sparsity
from siluette_client.streams import AsyncStream, Stream
from siluette_client.types import (
    ActivationSupport,
    Choice,
    Chunk,
    Completion,
    Model,
    PromptTokensDetails,
    TokenLogprob,
    TopLogprob,
    Usage,
)

__all__ = [
    "APIError",
    "Activation",
    "ActivationLike",
    "ActivationSupport",
    "AsyncClient",
    "AsyncStream",
    "BadRequest",
    "CallOptions",
    "Choice",
    "Chunk",
    "Client",
    "Completion",
    "ConnectionFailed",
    "ContextLengthExceeded",
    "InvalidAnswer",
    "Message",
    "Messages",
    "Mode",
    "Model",
    "NotFound",
    "Options",
    "Overloaded",
    "Prompt",
    "PromptTokensDetails",
    "RequestTimeout",
    "RetryPolicy",
    "Scope",
    "ServerError",
    "SiluetteError",
    "Sparsity",
    "Stream",
    "StreamFailed",
    "StreamInterrupted",
    "TokenLogprob",
    "TopLogprob",
    "TransportError",
    "Unavailable",
    "UntunedActivation",
    "Usage",
    "__version__",
]
