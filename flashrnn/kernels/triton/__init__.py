"""The whole scan as one Triton kernel."""
