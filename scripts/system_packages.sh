#!/usr/bin/env bash
# Installs the programs that some tests start and that pip does not have. Debian and Ubuntu; a test whose program is
# missing skips and names it, so failing here is a warning.
set -uo pipefail

missing=()
need() { # PROGRAM PACKAGE
    local places=("$(command -v "$1")" /usr/sbin/"$1" /usr/lib/postgresql/*/bin/"$1")
    for place in "${places[@]}"; do
        [[ -x $place ]] && return
    done
    missing+=("$2")
}
need pg_ctl postgresql
need redis-server redis-server
need prometheus prometheus
need promtool prometheus
need chromium chromium
(( ${#missing[@]} )) || exit 0

as_root=(env DEBIAN_FRONTEND=noninteractive)
if (( EUID != 0 )); then
    as_root=(sudo -n "${as_root[@]}")
fi
mapfile -t missing < <(printf '%s\n' "${missing[@]}" | sort -u)
if ! command -v apt-get > /dev/null || ! "${as_root[@]}" true 2> /dev/null; then
    echo "warning: tests that need ${missing[*]} will be skipped; install them with this system's package manager" >&2
    exit 0
fi
install=("${as_root[@]}" apt-get install -y --no-install-recommends "${missing[@]}")
# The lists of packages may be absent or old, so a second try follows an update.
"${install[@]}" > /dev/null 2>&1 || { "${as_root[@]}" apt-get update > /dev/null 2>&1; "${install[@]}" > /dev/null; } ||
    echo "warning: could not install ${missing[*]}; the tests that need them will be skipped" >&2
