#!/bin/sh
# Makes sure that this machine can build and test kedge. On Debian and Ubuntu it
# installs what is missing; elsewhere it says what to install.
set -eu
cd "$(dirname "$0")/.."

missing=""
sudo=""
[ "$(id -u)" = 0 ] || sudo=sudo
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
need nftables test -x /usr/sbin/nft
need e2fsprogs test -x /usr/sbin/mkfs.ext4 -o -x /sbin/mkfs.ext4
if [ -n "$missing" ]; then
	if ! command -v apt-get >/dev/null; then
		echo "please install:$missing" >&2
		exit 1
	fi
	echo "installing:$missing"
	$sudo apt-get update -qq
	DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends $missing >/dev/null
fi

# Go: any version from 1.21 on fetches the one that go.mod names by itself. Debian's
# and Ubuntu's older ones can at least download it, as the module that it is.
export PATH="$PWD/build/go/bin:$PATH:/usr/local/go/bin"
minor() { go version 2>/dev/null | sed -n 's/.* go1\.\([0-9]*\).*/\1/p'; }
if [ "$(minor || echo 0)" -ge 21 ] 2>/dev/null; then
	exit 0
fi
if ! command -v go >/dev/null; then
	echo "installing: golang-go"
	$sudo apt-get update -qq
	DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends golang-go >/dev/null
fi
if [ "$(minor || echo 0)" -lt 21 ]; then
	want=$(sed -n 's/^toolchain go//p' go.mod)
	[ -n "$want" ] || want=$(sed -n 's/^go //p' go.mod)
	echo "downloading: Go $want"
	tmp=$(mktemp -d)
	trap 'rm -rf "$tmp"' EXIT
	echo "module bootstrap" >"$tmp/go.mod"
	dir=$(cd "$tmp" && GOFLAGS= go mod download -json "golang.org/toolchain@v0.0.1-go$want.linux-$(go env GOARCH)" | sed -n 's/^[[:space:]]*"Dir": "\(.*\)",*$/\1/p')
	[ -d "$dir" ] || {
		echo "Go $want could not be had; install it, see https://go.dev/doc/install" >&2
		exit 1
	}
	# A copy, because modules are kept without permission to execute.
	mkdir -p build
	rm -rf build/go
	cp -R "$dir" build/go
	chmod -R u+w build/go
	chmod +x build/go/bin/* build/go/pkg/tool/*/*
fi
