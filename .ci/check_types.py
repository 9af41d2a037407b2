"""Type-checks what users get: mypy on the installed package, and on the examples and benchmarks that use it.

In the checkout, ./longclip_hf lacks the folders that setup.cfg maps into the package, and mypy would take it for the
package. So it runs in a folder with links to the rest alone. `tox run -e lint` installs the wheel and runs this.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
INSTALLED = ("longclip_hf", "modeling_longclip")
LINKED = ("examples", "benchmarks")

with tempfile.TemporaryDirectory() as folder:
    for name in LINKED:
        Path(folder, name).symlink_to(ROOT / name)
    packages = [word for name in (*INSTALLED, *LINKED) for word in ("-p", name)]
    options = ["--config-file", str(ROOT / "setup.cfg"), "--cache-dir", str(ROOT / ".mypy_cache")]
    sys.exit(subprocess.run([sys.executable, "-m", "mypy", *options, *packages], cwd=folder, check=False).returncode)
