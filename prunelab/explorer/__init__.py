"""The lab, and the widget over it. Nothing here is imported by the rest of prunelab."""
