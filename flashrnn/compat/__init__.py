"""What users of the upstream package, PyPI's ``flashrnn``, call.

``call`` translates its calls into ours, ``names`` has what its modules offer besides, and
``xlstm`` and ``tirex`` put this package in the place of other packages' own cells. The folder
``flashrnn/flashrnn`` has its import paths. Nothing else in this package imports from here, but for
:func:`flashrnn.flashrnn`, which hands over what is not its own kind of call.
"""
