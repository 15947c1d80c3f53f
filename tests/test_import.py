"""`import residual_steer` is light: what a model comes from is never imported to find out."""

import subprocess
import sys

HEAVY = ("transformers", "timm", "peft", "datasets", "mamba_ssm", "matplotlib", "sklearn")


def test_import_loads_no_model_library():
    code = "import sys, residual_steer; print([name for name in sys.argv[1:] if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code, *HEAVY], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
