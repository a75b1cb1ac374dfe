"""Prompts to rollouts: data rows, vLLM engines, the pool that hides how many there are, weight transfer."""
