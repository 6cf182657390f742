"""What enters: sockets and files that hand over raw messages."""
