"""A launch for each step, product and cell in one: any head dimension, on any GPU."""
