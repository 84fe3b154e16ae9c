"""Criteria: functions that score channels, higher = keep, and the registry that names them."""

from prunelab.criteria import activations as activations, weights as weights
from prunelab.criteria.registry import criteria_names as criteria_names, register as register, scores as scores
