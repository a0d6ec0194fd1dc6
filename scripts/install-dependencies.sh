#!/bin/sh
# Installs the Debian packages listed in packages.txt that are missing; does nothing, quickly, when none is.
#
#   scripts/install-dependencies.sh           install what is missing (with sudo where not root)
#   scripts/install-dependencies.sh --check   only say what is missing; exit status 1 if anything is
#   scripts/install-dependencies.sh LIST      the same for another list
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
case ${1:-} in
'' | --check) list="$here/packages.txt" ;;
*) list=$1 ;;
esac

fail() {
    echo "install-dependencies: $1" >&2
    exit 1
}

command -v dpkg-query >/dev/null || fail "this is not a Debian system (no dpkg-query). Install by hand what $list names."

wanted=$(sed -e 's/#.*//' -e 's/[[:space:]]*$//' -e '/^$/d' "$list")
# One dpkg-query for all: a process a package would cost more than the whole check may.
# shellcheck disable=SC2086
installed=$(dpkg-query --show --showformat='${db:Status-Abbrev} ${Package}\n' $wanted 2>/dev/null | sed -n 's/^.i  *//p' || true)
missing=$(printf '%s\n' "$wanted" | grep -vxF -e "${installed:-/}" || true)

if [ -z "$missing" ]; then
    exit 0
fi
# shellcheck disable=SC2086
echo "Debian packages missing:" $missing
if [ "${1:-}" = --check ]; then
    exit 1
fi

if [ "$(id -u)" -eq 0 ]; then
    sudo=''
elif command -v sudo >/dev/null; then
    sudo=sudo
    echo "Installing them needs root: sudo may ask for your password."
else
    # shellcheck disable=SC2086
    fail "not root and no sudo. As root, run: apt-get install --no-install-recommends" $missing
fi

export DEBIAN_FRONTEND=noninteractive
apt="$sudo env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300"

# Package lists that are absent or old name versions that the archive no longer has.
refresh() {
    if [ "${refreshed:-no}" = no ]; then
        $apt update || fail "apt-get update failed: is there a network, and are the sources in /etc/apt right?"
        refreshed=yes
    fi
}
if [ -z "$(find /var/lib/apt/lists -maxdepth 1 -name '*_Packages*' -mtime -1 2>/dev/null | head -n 1)" ]; then
    refresh
fi

# Tests start their own PostgreSQL: the package need not make a cluster, nor start one. Where the operator has a say in
# this file already, it stands.
case " $missing " in
*postgresql*)
    if [ ! -e /etc/postgresql-common/createcluster.conf ]; then
        $sudo mkdir -p /etc/postgresql-common
        echo 'create_main_cluster = false' | $sudo tee /etc/postgresql-common/createcluster.conf >/dev/null
    fi
    ;;
esac

# Tests start their own Ceph as well: on a machine that has had none, the packages' services stay off.
case " $missing " in
*ceph-mon* | *ceph-osd*)
    if [ ! -e /etc/ceph/ceph.conf ] && ! dpkg-query --status ceph-base >/dev/null 2>&1; then
        $sudo mkdir -p /etc/systemd/system
        for unit in ceph.target ceph-mon.target ceph-osd.target ceph-crash.service rbdmap.service; do
            [ -L "/etc/systemd/system/$unit" ] || $sudo ln -s /dev/null "/etc/systemd/system/$unit"
        done
    fi
    ;;
esac

# shellcheck disable=SC2086
if $apt install -y --no-install-recommends -o Dpkg::Options::=--force-confold $missing; then
    exit 0
fi
refresh

# QEMU's packages insist on one version among themselves. A machine whose qemu-utils came from backports cannot take
# the release's qemu-system beside it, so all of QEMU goes to one suite.
. /etc/os-release
qemu=''
others=''
for package in $missing; do
    case $package in
    qemu-*) ;;
    *) others="$others $package" ;;
    esac
done
for package in qemu-utils qemu-block-extra qemu-system-x86 qemu-system-common qemu-system-data; do
    qemu="$qemu $package/${VERSION_CODENAME:-bookworm}"
done
echo "Trying again with all of QEMU from ${VERSION_CODENAME:-bookworm}."
# shellcheck disable=SC2086
$apt install -y --no-install-recommends --allow-downgrades $qemu $others ||
    fail "apt-get could not install the packages above; its own message says why."
