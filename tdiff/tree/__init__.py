"""Stage 1, the TreeVAE: topology (pure), layers, model, losses, growth. Plain PyTorch, nothing of Ray or storage."""
