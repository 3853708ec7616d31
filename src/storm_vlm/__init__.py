"""STORM: a Mamba temporal projector between a vision encoder and an LLM, for token-efficient video understanding."""
