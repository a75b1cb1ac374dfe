"""The code that samples rollouts: it reads data rows, runs vLLM engines, and loads new weights into them. This
folder also contains the code for inference with PaCoRe."""
