#!/bin/sh
# Installs on Debian or Ubuntu what building kedge needs beside Go: a C compiler and
# libseccomp's static library, for runc and the pause program. Run as root.
#
#   scripts/install-build-deps.sh [amd64] [arm64]     default: this machine's
#
# The library of another architecture comes from the same distribution's packages
# ("multiarch"); Ubuntu serves foreign architectures from ports.ubuntu.com, which
# must be among the sources first.
set -eu
host=$(dpkg --print-architecture)
[ $# -gt 0 ] || set -- "$host"

packages="pkg-config"
for arch in "$@"; do
	case $arch in
	amd64) cross=x86-64-linux-gnu ;;
	arm64) cross=aarch64-linux-gnu ;;
	*) echo "install-build-deps: unknown architecture $arch" >&2 && exit 2 ;;
	esac
	if [ "$arch" = "$host" ]; then
		packages="$packages gcc libc6-dev libseccomp-dev"
	else
		dpkg --print-foreign-architectures | grep -qx "$arch" || dpkg --add-architecture "$arch"
		packages="$packages gcc-$cross libc6-dev-$arch-cross libseccomp-dev:$arch"
	fi
done
apt-get update -q
DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $packages
