"""``python -m flashrnn bench``: speed, memory and start-up time beside those of others.

``suites`` says which cases are measured, ``ours``, ``peers`` and ``upstream`` are who computes
them, each a ``contender``. ``timing``, ``memory`` and ``cold_start`` measure, after ``check`` has
found the results right. ``report`` writes rows as they come, ``figure`` draws them, and
``command`` is the command line.
"""
