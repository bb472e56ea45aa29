"""From generated source to something that runs."""
