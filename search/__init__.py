"""From images and texts to a table of embeddings, an index and an answer."""
