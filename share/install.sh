#!/bin/sh
# install.sh install|uninstall: as PREFIX and DESTDIR say; PYTHON runs the programs, BUILDER builds them.
# Everything is built in a scratch directory as who we are, then copied, through sudo where only root may write.
set -eu
umask 022
library=$PREFIX/lib/vhost-user-qcow2
list=$library/files

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
    place=$DESTDIR$PREFIX
    while [ ! -e "$place" ]; do place=$(dirname "$place"); done
    if [ "$(id -u)" = 0 ] || [ -w "$place" ]; then
        "$@"
    else
        command -v sudo >/dev/null || fail "$place: only root may write there"
        sudo "$@"
    fi
}

launcher() {
    cat <<END
#!$PYTHON -I
import os.path
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), "../lib/vhost-user-qcow2"))
from $2 import $3

sys.exit($3())
END
}

build() {
    "$BUILDER" -m pip install -q --disable-pip-version-check --target="$stage$library" .
    rm -rf "$stage$library/bin"
    mkdir -p "$stage$PREFIX/bin"
    launcher vhost-user-qcow2 vhost.command main >"$stage$PREFIX/bin/vhost-user-qcow2"
    launcher qcow2 qcow2.tool program >"$stage$PREFIX/bin/qcow2"
    chmod 755 "$stage$PREFIX"/bin/*
    "$BUILDER" share/generate.py "$stage$PREFIX" --bindir="$PREFIX/bin" \
        --units="$stage$units" --discovery="$stage$discovery"
    (cd "$stage" && find . -type f ! -path ".$library/*" | sed 's/^\.//') >"$scratch/files"
    mv "$scratch/files" "$stage$list"
}

copy() {
    privileged rm -rf "$DESTDIR$library"
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

uninstall() {
    [ -e "$DESTDIR$list" ] || fail "$DESTDIR$list: not there, so nothing is installed"
    while read -r file; do
        privileged rm -f "$DESTDIR$file"
    done <"$DESTDIR$list"
    privileged rm -rf "$DESTDIR$library"
}

case $PREFIX in
/*) ;;
*) fail "PREFIX=$PREFIX: not an absolute path" ;;
esac
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
