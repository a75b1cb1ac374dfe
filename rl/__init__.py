"""What every stage shares: recipes, models, the PPO learner, checkpoints and the run's traces."""
