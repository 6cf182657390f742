"""Offline: growing a prior; the daemon never imports it."""
