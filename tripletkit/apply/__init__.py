"""What a trained head is for: its embeddings, its numbers, and files for other programs."""
