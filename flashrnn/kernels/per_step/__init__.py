"""One launch for each step, which computes product and cell: any head dimension, on any GPU."""
