"""Device code that several regimes include."""
