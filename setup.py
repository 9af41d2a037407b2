"""All metadata is in setup.cfg. Only this cannot be said there: the card's template, which stands at the top of the
checkout, goes into the package, where an installed `longclip-stretch` finds it.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

TEMPLATE = "model_card.md"


class BuildWithTemplate(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            self.copy_file(TEMPLATE, str(Path(self.build_lib, "longclip_hf", TEMPLATE)))


setup(cmdclass={"build_py": BuildWithTemplate})
