"""The code that samples rollouts: it reads data rows, runs vLLM engines, and loads new weights into them. Also has
PaCoRe at inference."""
