"""Shared by all stages: recipes, models, the PPO learner, checkpoints, and what a run records."""
