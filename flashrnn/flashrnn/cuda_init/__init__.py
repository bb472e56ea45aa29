"""Upstream's module of this name builds its CUDA code. Here it is a package, which Python finds
first: upstream's package imports it, and so cannot run among the files of this one.
"""

from flashrnn.compat.installed import explain

raise ImportError(explain("flashrnn.flashrnn.cuda_init, a module of upstream's, was imported"))
