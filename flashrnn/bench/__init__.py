"""``python -m flashrnn bench``: speed, memory and start-up time, compared with other packages.

``suites`` lists the cases to be measured, and ``arena`` draws random ones. ``ours``, ``peers``,
``layers``, ``single_step`` and ``upstream`` have the contenders that compute them (``contender`` is
their base). ``check`` compares results with the truth before anything is timed. ``timing``,
``memory`` and ``cold_start`` measure one contender after another; ``in_turns`` measures the
contenders of a case alternately, with ``clocks``. ``report`` writes the rows, ``compared``
summarizes them, ``figure`` draws them, and ``command`` is the command line.
"""
