"""A stand-in for the installed package open_clip_torch, as far as this project reads it."""

from pathlib import Path

NAMES = [f"thing {number}" for number in range(1000)]
TEMPLATES = [f"picture {number} of a {{}}." for number in range(80)]


def write_open_clip(folder: Path, names: int = 1000, different: int = 80) -> None:
    """Writes the package into `folder`. Like the real one, it cannot be imported without torchvision.

    Of its 80 templates so many are `different`: equal texts are encoded once.
    """
    package = folder / "open_clip"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import torchvision_that_is_not_installed\n")
    lines = ["", "OPENAI_IMAGENET_TEMPLATES = ("]
    lines += [f"    lambda c: f'picture {number % different} of a {{c}}.'," for number in range(80)]
    lines += [")", "", "IMAGENET_CLASSNAMES = (", *(f"    'thing {number}'," for number in range(names)), ")", ""]
    (package / "zero_shot_metadata.py").write_text("\n".join(lines))
