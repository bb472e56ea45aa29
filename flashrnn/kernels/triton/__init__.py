"""All steps of a scan in one Triton kernel, forward and backward: heads of up to 128 units."""
