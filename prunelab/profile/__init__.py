"""What a network does on data: streaming statistics of every channel, and cached activations of a sample."""
