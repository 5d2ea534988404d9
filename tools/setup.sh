# Sourced by tools/quickstart and tools/test: installs what is missing on a Debian or Ubuntu machine
# and leaves the virtual environment's programs first on the PATH.
#
# setup_system PACKAGE...   Debian packages, installed only when one of them is missing
# setup_python EXTRA        the virtual environment .venv with cloudfs and its extra ("" or "[test]")

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

setup_system() {
    local missing=() package
    for package in "$@"; do
        dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' ||
            missing+=("$package")
    done
    [ ${#missing[@]} -eq 0 ] && return
    local root=()
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null || {
            echo "Missing packages: ${missing[*]}. Install them as root, then run this again." >&2
            exit 1
        }
        root=(sudo)
    fi
    echo "Installing ${missing[*]} …"
    "${root[@]}" apt-get update -qq
    "${root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

setup_python() {
    local extra=$1 python=python3 stamp
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "cloudfs needs Python 3.11 or newer; this machine's python3 is $("$python" -V)." >&2
        exit 1
    }
    [ -x "$here/.venv/bin/python" ] || "$python" -m venv "$here/.venv"
    # Installed once for each state of what is asked for.
    stamp="$here/.venv/installed-$(cat "$here"/setup.{py,cfg} "$here/pyproject.toml" | sha256sum |
        cut -c1-16)${extra//[^a-z]/}"
    if [ ! -e "$stamp" ]; then
        echo "Installing cloudfs${extra} into .venv …"
        "$here/.venv/bin/python" -m pip install -q --upgrade pip
        PYTHONWARNINGS=ignore "$here/.venv/bin/python" -m pip install -q -e "$here$extra"
        # An editable install makes the manual pages, but does not install them.
        local page
        for page in "$here"/build/man/*.[1-8]; do
            install -D -m 644 "$page" "$here/.venv/share/man/man${page##*.}/${page##*/}"
        done
        touch "$stamp"
    fi
    PATH="$here/.venv/bin:$PATH"
}
