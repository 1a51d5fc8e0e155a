#!/bin/sh
# Makes sure that this machine can build and test kedge. On Debian and Ubuntu it
# installs what is missing; elsewhere it says what to install.
set -eu
cd "$(dirname "$0")/.."

missing=""
need() { # need PACKAGE TEST...
	pkg=$1
	shift
	"$@" >/dev/null 2>&1 || missing="$missing $pkg"
}
triplet=$(uname -m)-linux-gnu
need gcc command -v gcc
need libc6-dev test -e /usr/include/stdio.h
need libseccomp-dev test -e "/usr/lib/$triplet/libseccomp.a"
need pkg-config command -v pkg-config
need make command -v make
need git command -v git
need ca-certificates test -d /etc/ssl/certs
need busybox-static test -x /bin/busybox
if [ -n "$missing" ]; then
	if ! command -v apt-get >/dev/null; then
		echo "please install:$missing" >&2
		exit 1
	fi
	sudo=""
	[ "$(id -u)" = 0 ] || sudo=sudo
	echo "installing:$missing"
	$sudo apt-get update -qq
	DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends $missing >/dev/null
fi
command -v go >/dev/null || {
	echo "Go is missing: install Go 1.26 or later, see https://go.dev/doc/install" >&2
	exit 1
}
