#!/bin/sh
# install.sh install|uninstall: as PREFIX and DESTDIR say; PYTHON runs the programs, BUILDER builds them.
# Everything is built in a scratch directory as who we are, then copied, through sudo where only root may write.
set -eu
umask 022
case $PREFIX in
/*) PREFIX=${PREFIX%/} ;;
*) echo "install: PREFIX=$PREFIX: not an absolute path" >&2 && exit 1 ;;
esac
library=$PREFIX/lib/vhost-user-qcow2
list=$library/files             # all but those of the library
directories=$library/directories # those that were not there before

# Where systemd, and libvirt and QEMU, look for what is installed under PREFIX.
units=$PREFIX/lib/systemd/system
case $PREFIX in
/usr/local) discovery=/etc/qemu/vhost-user ;;
*) discovery=$PREFIX/share/qemu/vhost-user ;;
esac

fail() {
    echo "install: $*" >&2
    exit 1
}

# privileged COMMAND...: through sudo if the target is not ours.
privileged() {
    for place in "$DESTDIR$PREFIX" "$DESTDIR$discovery"; do
        while [ ! -e "$place" ]; do place=$(dirname "$place"); done
        if [ "$(id -u)" != 0 ] && [ ! -w "$place" ]; then
            command -v sudo >/dev/null || fail "$place: only root may write there"
            sudo "$@"
            return
        fi
    done
    "$@"
}

# launcher MODULE FUNCTION: a program that finds its library beside itself.
launcher() {
    cat <<END
#!$PYTHON -I
import os.path
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), "../lib/vhost-user-qcow2"))
from $1 import $2

sys.exit($2())
END
}

# launchers DIRECTORY: one for each of the programs that pyproject.toml names.
launchers() {
    mkdir -p "$1"
    sed -n '/^\[console_scripts\]/,/^\[[^c]/s/^\(.*\) = \(.*\):\(.*\)$/\1 \2 \3/p' "$stage$library"/vhost_user_qcow2-*.dist-info/entry_points.txt |
        while read -r program module function; do
            launcher "$module" "$function" >"$1/$program"
            chmod 755 "$1/$program"
        done
}

build() {
    # One build at a time in this clone: setuptools copies out of `build` what another one would just delete.
    exec 9<share/install.sh
    flock 9
    # Or modules that are gone would come along.
    [ ! -d build ] || find build -name '*.py' -delete
    "$BUILDER" -m pip install -q --disable-pip-version-check --no-build-isolation --target="$stage$library" .
    rm -rf "$stage$library/bin"
    launchers "$stage$PREFIX/bin"
    "$BUILDER" share/generate.py "$stage$PREFIX" --bindir="$PREFIX/bin" \
        --units="$stage$units" --discovery="$stage$discovery"
    (cd "$stage" && find . -type f ! -path ".$library/*" | sed 's/^\.//') >"$scratch/files"
    mv "$scratch/files" "$stage$list"
}

# missing_directories: those of the stage that are not there, and those that an earlier install made.
missing_directories() {
    [ ! -e "$DESTDIR$directories" ] || cat "$DESTDIR$directories"
    (cd "$stage" && find . -mindepth 1 -path ".$library" -prune -o -type d -print | sed 's/^\.//') | while read -r directory; do
        [ -e "$DESTDIR$directory" ] || echo "$directory"
    done
}

copy() {
    missing_directories | sort -u >"$scratch/directories"
    mv "$scratch/directories" "$stage$directories"
    if [ -e "$DESTDIR$list" ]; then remove_files; fi
    privileged mkdir -p "$DESTDIR/"
    privileged cp -R "$stage/." "$DESTDIR/"
    # After sudo make install the clone is still its owner's.
    [ -z "${SUDO_UID:-}" ] || chown -R --reference=Makefile .
}

say() {
    echo "installed $PREFIX/bin/vhost-user-qcow2, $PREFIX/bin/qcow2, $units, $discovery${DESTDIR:+ below $DESTDIR}"
    case $PREFIX in
    /usr | /usr/local) ;;
    *) echo "systemd and libvirt do not look below $PREFIX: systemctl link the units, copy the discovery file to /etc/qemu/vhost-user" ;;
    esac
}

remove_files() {
    while read -r file; do
        privileged rm -f "$DESTDIR$file" </dev/null
    done <"$DESTDIR$list"
    privileged rm -rf "$DESTDIR$library"
}

uninstall() {
    [ -e "$DESTDIR$list" ] || fail "$DESTDIR$list: not there, so nothing is installed"
    made=
    if [ -e "$DESTDIR$directories" ]; then made=$(sort -r "$DESTDIR$directories"); fi
    remove_files
    echo "$made" | while read -r directory; do
        [ ! -d "$DESTDIR$directory" ] || privileged rmdir --ignore-fail-on-non-empty "$DESTDIR$directory" </dev/null
    done
}

case $1 in
install)
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    stage=$scratch/stage
    build
    copy
    say
    ;;
uninstall) uninstall ;;
*) fail "$1: not install or uninstall" ;;
esac
