#!/bin/sh
# Makes sure that this machine can build and test kedge. On Debian and Ubuntu it
# installs missing packages; elsewhere it prints the names of the packages to install.
#
#   scripts/deps.sh [ARCH]     ARCH is amd64 or arm64, the target of the build; default: this machine's
#
# The C library and libseccomp of another architecture come from the same distribution's
# packages ("multiarch"); Ubuntu serves foreign architectures from its "ports" archive, which
# must be among the sources first.
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
case $(uname -m) in
x86_64) host=amd64 ;;
aarch64) host=arm64 ;;
*) echo "deps: kedge supports amd64 and arm64, and this machine is neither" >&2 && exit 1 ;;
esac
arch=${1:-$host}
case $arch in
amd64) triplet=x86_64-linux-gnu cross=x86-64-linux-gnu ;;
arm64) triplet=aarch64-linux-gnu cross=aarch64-linux-gnu ;;
*) echo "deps: unknown architecture $arch; use amd64 or arm64" >&2 && exit 2 ;;
esac

# For runc and the pause program: a C compiler, and libseccomp's static library.
if [ "$arch" = "$host" ]; then
	need gcc command -v gcc
	need libc6-dev test -e /usr/include/stdio.h
	need libseccomp-dev test -e "/usr/lib/$triplet/libseccomp.a"
else
	need "gcc-$cross" command -v "$triplet-gcc"
	need "libc6-dev-$arch-cross" test -e "/usr/$triplet/include/stdio.h"
	need "libseccomp-dev:$arch" test -e "/usr/lib/$triplet/libseccomp.a"
fi
need pkg-config command -v pkg-config
need make command -v make
need git command -v git
need ca-certificates test -d /etc/ssl/certs
# For tests.
need busybox-static test -x /bin/busybox
need nftables test -x /usr/sbin/nft
need e2fsprogs test -x /usr/sbin/mkfs.ext4 -o -x /sbin/mkfs.ext4
need musl-tools command -v musl-gcc
need shellcheck command -v shellcheck
# For tests of scripts/install.sh, in each shell and with each program that it may use.
for program in dash bash curl wget openssl minisign; do
	need $program command -v $program
done
if [ -n "$missing" ]; then
	if ! command -v apt-get >/dev/null; then
		echo "please install:$missing" >&2
		exit 1
	fi
	echo "installing:$missing"
	case $missing in
	*:"$arch"*) dpkg --print-foreign-architectures | grep -qx "$arch" || $sudo dpkg --add-architecture "$arch" ;;
	esac
	$sudo apt-get update -qq
	# shellcheck disable=SC2086 # several words
	$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
fi

# Go: any version from 1.21 on downloads the version in go.mod itself. Older versions
# of Debian and Ubuntu can at least download it as a module.
export PATH="$PWD/build/go/bin:$PATH:/usr/local/go/bin"
minor() { go version 2>/dev/null | sed -n 's/.* go1\.\([0-9]*\).*/\1/p'; }
if [ "$(minor || echo 0)" -ge 21 ] 2>/dev/null; then
	exit 0
fi
if ! command -v go >/dev/null; then
	echo "installing: golang-go"
	$sudo apt-get update -qq
	$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends golang-go >/dev/null
fi
if [ "$(minor || echo 0)" -lt 21 ]; then
	want=$(sed -n 's/^toolchain go//p' go.mod)
	[ -n "$want" ] || want=$(sed -n 's/^go //p' go.mod)
	echo "downloading: Go $want"
	tmp=$(mktemp -d)
	trap 'rm -rf "$tmp"' EXIT
	echo "module bootstrap" >"$tmp/go.mod"
	dir=$(cd "$tmp" && GOFLAGS='' go mod download -json "golang.org/toolchain@v0.0.1-go$want.linux-$(go env GOARCH)" | sed -n 's/^[[:space:]]*"Dir": "\(.*\)",*$/\1/p')
	[ -d "$dir" ] || {
		echo "Go $want could not be downloaded; install it, see https://go.dev/doc/install" >&2
		exit 1
	}
	# It is copied, because files of modules are not executable.
	mkdir -p build
	rm -rf build/go
	cp -R "$dir" build/go
	chmod -R u+w build/go
	chmod +x build/go/bin/* build/go/pkg/tool/*/*
	# A module of its own, so that ./... does not include its packages.
	echo "module toolchain" >build/go/go.mod
fi
