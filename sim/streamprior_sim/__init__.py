"""The digital twin: samples, optics and a detector that stand in for a beamline."""
