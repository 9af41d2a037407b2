"""The embedded world: rendered scenes with short and long captions. README.md describes it."""
