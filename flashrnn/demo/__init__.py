"""``python -m flashrnn demo``: train small recurrent networks on tasks that need a state.

``automata`` states the tasks, ``state_tracking`` trains on them; ``language`` trains a character
language model. Both use the network in ``model`` and run in one process or many
(``distributed``). ``command`` is the command line.
"""
