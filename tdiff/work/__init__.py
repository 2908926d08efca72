"""What Ray workers run: growing the tree, training the diffusion, sampling. Knows the loop, the data and the models."""
