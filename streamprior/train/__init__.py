"""Offline: growing a prior; the daemon never imports it."""

from streamprior.train.grow import grow_prior as grow_prior
from streamprior.train.settings import TrainSettings as TrainSettings
