"""``flashrnn.flashrnn.triton_fused``, upstream's package."""
