"""The kernels. They name no cell: the compiled cell comes in as rendered text."""
