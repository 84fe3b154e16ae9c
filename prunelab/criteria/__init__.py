"""Criteria: functions that score channels, higher = keep, and the registry that names them."""

# In the order in which they are offered.
from prunelab.criteria import weights as weights  # isort: skip
from prunelab.criteria import activations as activations, similarity as similarity, gradients as gradients  # isort: skip
from prunelab.criteria import result_oriented as result_oriented  # isort: skip
from prunelab.criteria.combining import COMBINES as COMBINES
from prunelab.criteria.registry import criteria_names as criteria_names, register as register, scores as scores
