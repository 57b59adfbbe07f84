#!/usr/bin/env bash
# Sets up, builds and passes all checks and tests. Needs Python 3.10+ and g++. Arguments go to pytest, such as -m cuda.
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/venv.sh

mapfile -t cpp < <(git ls-files --cached --others --exclude-standard '*.h' '*.cpp' '*.cu' '*.cuh')
clang-format --dry-run -Werror "${cpp[@]}"
ruff check .
ruff format --check --exclude "*.md" .
bash tests/mypy.sh

# One thread a process, since pytest-xdist keeps the cores busy; tests of threads set their own number.
workers=$(nproc)  # first: it would count OMP_NUM_THREADS
export OMP_NUM_THREADS=1
exec python -m pytest -n "$workers" --dist loadgroup "$@"
