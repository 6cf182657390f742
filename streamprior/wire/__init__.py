"""Bytes <-> records, without sockets."""
