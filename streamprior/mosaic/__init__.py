"""Ptychography: frames with positions -> one running image of the sample."""
