"""The traced network: nodes, channel classes, layers, cost, and the interpreter."""
