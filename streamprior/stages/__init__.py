"""What thinks: each file turns the batch one step further."""
