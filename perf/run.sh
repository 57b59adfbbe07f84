#!/usr/bin/env bash
# Sets up, builds and runs the main job: every op on real work, checked and timed. Needs Python 3.10+ and g++.
# Arguments go to `python -m effk.perf`. EFFK_VENV is the virtual environment's place (.venv by default).
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/venv.sh
exec python -m effk.perf "$@"
