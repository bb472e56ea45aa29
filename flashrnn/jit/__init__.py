"""From source to a launch: compilation, its cache on disk, loading, and launches."""
