"""What users of the upstream package, PyPI's ``flashrnn``, call.

``call`` translates upstream's calls into this package's, ``names`` has the other functions of its
modules, and ``xlstm`` and ``tirex`` replace other packages' cells with this one's. The folder
``flashrnn/flashrnn`` has upstream's import paths. Only two other places import from here:
``flashrnn()``, which hands over upstream's kind of calls, and ``import flashrnn``, for
:mod:`.installed`.
"""
