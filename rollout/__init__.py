"""Everything that samples rollouts: data rows, vLLM engines, the pool of engines, weight transfer, PaCoRe at
inference."""
