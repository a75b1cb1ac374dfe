"""Everything to sample rollouts: data rows, vLLM engines, the pool of engines, weight transfer, PaCoRe at inference."""
