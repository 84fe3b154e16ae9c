"""Criteria: functions that score channels, higher = keep, and the registry that names them."""

from prunelab.criteria import activations as activations, weights as weights
from prunelab.criteria.registry import available as available, register as register, scores as scores
