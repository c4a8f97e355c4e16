#!/bin/sh
# libvirt.sh system|session DIRECTORY: boot DIRECTORY/domain.xml with this host's libvirt, plug in second.xml, fail to plug
# in denied.xml if that is there, wait for the end. In a pid and a mount namespace of its own, so that nothing survives it.
set -eu
exec </dev/null
mode=$1 directory=$2

private() {
    mkdir -p "$1" "$directory/world$1"
    mount --bind "$directory/world$1" "$1"
}

ask() {
    virsh -q -c "qemu:///$mode" "$@"
}

start_system() {
    mount --make-rprivate /
    cp -a /etc/libvirt "$directory/etc"
    mount --bind "$directory/etc" /etc/libvirt
    for place in /run/libvirt /var/lib/libvirt /var/cache/libvirt /var/log/libvirt; do private $place; done
    virtlogd >"$directory/virtlogd.log" 2>&1 &
    libvirtd >"$directory/libvirtd.log" 2>&1 &
    until ask version >"$directory/version" 2>&1; do sleep 0.1; done
}

# In a session virsh starts the daemons.
start_session() {
    export HOME="$directory/home" XDG_RUNTIME_DIR="$directory/run" XDG_CACHE_HOME="$directory/cache"
    export XDG_CONFIG_HOME="$directory/config"
    mkdir -p "$HOME" "$XDG_RUNTIME_DIR"
}

"start_$mode"
ask define "$directory/domain.xml"
ask start guest
until grep -q '^wants a second disk' "$directory/console"; do sleep 0.1; done
if [ -e "$directory/denied.xml" ]; then
    ! ask attach-device guest "$directory/denied.xml" 2>"$directory/denied" || exit 1
fi
ask attach-device guest "$directory/second.xml"
while [ "$(ask domstate guest)" = running ]; do sleep 0.2; done
