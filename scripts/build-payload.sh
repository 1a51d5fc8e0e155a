#!/bin/sh
# Builds the programs that are embedded in the executable for one architecture: the
# runc shim and runc, from the modules pinned in go.mod, and the pause program. All are
# static and stripped, and compressed into runtime/payload/ARCH.
#
#   scripts/build-payload.sh [ARCH]     ARCH is amd64 or arm64, default this machine's
#
# Does nothing if neither versions nor sources have changed.
# Needs gcc and libseccomp's static library of that architecture;
# scripts/deps.sh installs them on Debian and Ubuntu.
set -eu
cd "$(dirname "$0")/.."

arch=${1:-$(go env GOHOSTARCH)}
case $arch in
amd64) triplet=x86_64-linux-gnu ;;
arm64) triplet=aarch64-linux-gnu ;;
*) echo "build-payload: unknown architecture $arch; use amd64 or arm64" >&2 && exit 2 ;;
esac
# The prefixed compiler if it is installed, else the native one.
cc=$triplet-gcc
if ! command -v "$cc" >/dev/null; then
	if [ "$arch" != "$(go env GOHOSTARCH)" ]; then
		echo "build-payload: $cc is missing; run scripts/deps.sh $arch" >&2
		exit 1
	fi
	cc=gcc
fi

out=runtime/payload/$arch
build=build/payload/$arch
stamp=$build/stamp
mkdir -p "$out" "$build"

shim=github.com/containerd/containerd/v2
runc=github.com/opencontainers/runc
now=$({
	go version
	$cc --version | head -n 1
	cat go.mod go.sum runtime/pause/pause.c runtime/shim/*.go internal/footprint/timerslack.go scripts/build-payload.sh scripts/payload/main.go
} | sha256sum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$now" ] && [ -f "$out/manifest.json.zst" ]; then
	echo "payload for $arch is up to date"
	exit 0
fi
rm -f "$stamp"

# seccomp is required: without it runc refuses every profile, and pods would
# have to run unconfined. Only the static library of libseccomp is used.
pkgdir=/usr/lib/$triplet/pkgconfig
if [ ! -f "/usr/lib/$triplet/libseccomp.a" ]; then
	echo "build-payload: libseccomp.a for $arch is missing; run scripts/deps.sh $arch" >&2
	exit 1
fi

version() { go list -m -f '{{.Version}}' "$1"; }

echo "building containerd-shim-runc-v2 $(version $shim) for $arch"
CGO_ENABLED=0 GOARCH=$arch go build -trimpath -tags no_grpc \
	-ldflags "-s -w -X $shim/version.Version=$(version $shim)" \
	-o "$build/containerd-shim-runc-v2" ./runtime/shim

echo "building runc $(version $runc) for $arch"
CGO_ENABLED=1 GOARCH=$arch CC=$cc PKG_CONFIG_LIBDIR=$pkgdir go build -trimpath \
	-tags "seccomp netgo osusergo" \
	-ldflags "-s -w -X main.version=$(version $runc | sed 's/^v//') -extldflags -static" \
	-o "$build/runc" $runc

echo "building pause for $arch"
$cc -Os -ffreestanding -nostdlib -static -no-pie -fno-asynchronous-unwind-tables -fno-stack-protector \
	-Wall -Werror -s \
	-Wl,--build-id=none -Wl,-z,noexecstack -Wl,-z,max-page-size=4096 -Wl,-z,noseparate-code \
	-o "$build/pause" runtime/pause/pause.c

CGO_ENABLED=0 go run ./scripts/payload "$out" \
	"$build/containerd-shim-runc-v2" "$build/runc" "$build/pause"
echo "$now" >"$stamp"
