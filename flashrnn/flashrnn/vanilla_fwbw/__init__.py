"""``flashrnn.flashrnn.vanilla_fwbw``, upstream's package."""
