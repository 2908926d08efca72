"""Stage 2: a diffusion model conditioned on a path of the tree. Plain PyTorch, no files, no cluster."""
