"""``flashrnn.flashrnn.vanilla``, upstream's plain version."""

from flashrnn.compat.names import flashrnn_forward, flashrnn_pointwise_function_registry

__all__ = ["flashrnn_forward", "flashrnn_pointwise_function_registry"]
