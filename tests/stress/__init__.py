"""What use in earnest does to the backends, part by part: ``python -m tests.stress --list``."""
