"""``python -m flashrnn bench``: speed, memory and start-up time beside those of others.

``suites`` says which cases are measured, and ``arena`` draws random ones. ``ours``, ``peers``,
``layers``, ``single_step`` and ``upstream`` are who computes them, each a ``contender``.
``timing``, ``memory`` and ``cold_start`` measure one contender after another, ``in_turns`` those of
a case side by side by the ``clocks``, after ``check`` has found the results right. ``report``
writes rows as they come, ``compared`` sums up, ``figure`` draws, and ``command`` is the command
line.
"""
