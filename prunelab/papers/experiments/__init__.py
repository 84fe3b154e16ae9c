"""What ``prunelab reproduce`` runs: which networks are trained, cut and measured, on which data."""
