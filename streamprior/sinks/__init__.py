"""What leaves: archive, live arrays, metrics."""
