"""training/noise_search."""
