#!/usr/bin/env bash
# mypy on the package as it is installed: it can't follow an editable installation of folders with other names.
set -euo pipefail
cd "$(dirname "$0")/.."
rm -rf build/mypy
mkdir -p build/mypy/effk
ln -s "$PWD"/python_api/* "$PWD"/kernels "$PWD"/perf build/mypy/effk
MYPYPATH=build/mypy exec mypy
