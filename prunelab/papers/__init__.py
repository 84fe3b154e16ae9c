"""Pruning methods from five papers, each in one short file, and the evidence for them: ``prunelab reproduce``."""
