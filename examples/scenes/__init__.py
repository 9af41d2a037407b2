"""The embedded world: rendered scenes with short and long captions. README.md describes it."""

from pathlib import Path


def _from_here(name: str) -> Path:
    """A file of this folder, as a command that is run here would name it."""
    path = Path(__file__).parent / name
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


CLIP = _from_here("clip")  # the small CLIP, pre-trained on short captions by pretrain.py
RECIPE = _from_here("recipe.yaml")  # of fine-tuning
