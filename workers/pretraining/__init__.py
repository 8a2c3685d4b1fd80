"""How the shipped vision encoder and language model were trained: seeded scripts over the project's own pictures and their texts."""
