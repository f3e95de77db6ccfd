#!/bin/sh
# Makes .venv and installs into it; `make` calls this.   install.sh <python> <extras, or ""> <dependency groups of pyproject.toml ...>
#
# With uv: that of the PATH, else one that pip puts into .venv, else (no wheel of uv for this machine) with pip itself. All read pip's own
# settings (an index, find-links), which decide between a CPU and a CUDA build of torch. constraints.txt fixes the versions that the
# project's numbers were measured with.
set -eu
cd "$(dirname "$0")"
python=$1 extras=$2
shift 2
fail() { echo "installation: $*" >&2; exit 1; }

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
  fail "Python 3.11 or newer is needed and '$python' is not: name one, as in make train PYTHON=python3.12"
free=$(df -Pk . | awk 'NR == 2 {print int($4 / 1024)}')
[ "$free" -ge "${GRACE_LEAST_FREE_MIB:-3000}" ] || fail "3 GB are needed in $(pwd) and $free MB are free: make room"
[ -x .venv/bin/python ] && .venv/bin/python -c '' 2>/dev/null || "$python" -m venv --clear .venv ||
  fail "'$python' makes no virtual environment: install its venv module (Debian, Ubuntu: apt-get install python3-venv)"

# What pip is told by its environment or its files, several values with commas or spaces between them.
told() { .venv/bin/python - "$1" "$2" <<'END'
import os, subprocess, sys
name, separator = sys.argv[1:]
asked = subprocess.run([sys.executable, "-m", "pip", "config", "get", f"global.{name}"], capture_output=True, text=True)
print(separator.join((os.environ.get("PIP_" + name.upper().replace("-", "_")) or asked.stdout.strip().strip("'")).split()))
END
}
works() { uv --version >/dev/null 2>&1; }
works || export PATH="$(pwd)/.venv/bin:$PATH"
works || .venv/bin/python -m pip install --quiet --disable-pip-version-check --retries 0 --timeout 10 --only-binary :all: uv >/dev/null 2>&1 || true
hash -r # the shell may remember one that does not work
with_pip() { .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@"; }
if works; then
  tool=uv minutes=1
  export UV_FIND_LINKS="${UV_FIND_LINKS:-$(told find-links ,)}" UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$(told index-url ' ')}"
  export UV_INDEX="${UV_INDEX:-$(told extra-index-url ' ')}" UV_CONSTRAINT="${UV_CONSTRAINT:-$(told constraint ' ')}"
  export UV_INDEX_STRATEGY="${UV_INDEX_STRATEGY:-unsafe-best-match}" SSL_CERT_FILE="${SSL_CERT_FILE:-$(told cert ' ')}"
  for name in UV_FIND_LINKS UV_DEFAULT_INDEX UV_INDEX UV_CONSTRAINT SSL_CERT_FILE; do
    eval "[ -n \"\$$name\" ]" || unset "$name"
  done
  get() { # pip knows settings that uv does not (a proxy, a client's certificate)
    uv pip install --quiet --python .venv/bin/python "$@" || { echo "  uv did not install: pip tries, in some 4 min" >&2; with_pip "$@"; }
  }
else
  tool=pip minutes=4
  get() { with_pip "$@"; }
fi

echo "Installing into .venv with $tool: about $minutes min from a near index, once; then the work begins ..."
( gone=0; while sleep 20 >/dev/null 2>&1; do
    gone=$((gone + 20)) left=$((minutes * 60 - gone))
    [ $left -gt 0 ] && left="about $left s left" || left="longer than usual: a far index, or a busy machine"
    echo "  installing: $gone s gone, $left"
  done ) &
ticker=$!
trap 'kill $ticker 2>/dev/null' EXIT
advice="see the lines of $tool above. No network or a proxy: HTTPS_PROXY, PIP_INDEX_URL or PIP_FIND_LINKS say where packages come from"
get --constraint constraints.txt --editable ".${extras:+[$extras]}" || fail "$advice"
named='import sys, tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"][sys.argv[1]])'
for group in "$@"; do # without their dependencies
  get --no-deps $(.venv/bin/python -c "$named" "$group") || fail "$advice"
done
