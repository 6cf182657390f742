"""Hostile inputs -> the certainty that decoders answer them with a WireError, soon, and with nothing else.

`python -m tests.fuzz --target v2 --inputs 1000000 --seed 1` hunts; what it finds is written as a file that `--replay FILE` runs again.
Inputs are made of valid messages (ours, and the recordings in $STREAMPRIOR_DATA) by changes to their structure and to their bytes; the
corpus beside this file holds few that reach many lines. tests/test_fuzz.py replays it and hunts for a minute.
"""
