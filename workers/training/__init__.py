"""Training: which samples a step sees (batches), one optimizer step (engine), saved state (checkpoints), the loop, and Ray Train around it (run)."""
