"""What users of the upstream package, PyPI's ``flashrnn``, call.

``call`` translates its calls into ours, ``names`` has what its modules offer besides, and
``xlstm`` and ``tirex`` put this package in the place of other packages' own cells. The folder
``flashrnn/flashrnn`` has its import paths. Nothing else imports from here but ``flashrnn()``, which
hands over what is not its own kind of call, and ``import flashrnn``, for :mod:`.installed`.
"""
