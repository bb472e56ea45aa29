"""The parts of backend ``cuda_fused``."""
