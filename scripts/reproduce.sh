#!/bin/sh
# Builds the release of the commit that is checked out twice, and compares the results byte by byte. The second build is in
# another folder, with another environment, and compiles everything anew: Go's cache of the first would hide
# differences. That takes a quarter of an hour on two cores.
#
#   scripts/reproduce.sh [ARCH...]     default: amd64 arm64   (see `make reproduce`)
#
# KEDGE_WARM=1 uses Go's cache for the second build too, which takes a minute and finds less.
set -eu
cd "$(dirname "$0")/.."
tmp=$(mktemp -d)
clean_up() {
	chmod -R u+w "$tmp" # Go protects what it unpacks
	rm -rf "$tmp"
}
trap clean_up EXIT

KEDGE_UNSIGNED=1 KEDGE_CLONE="$tmp/a" KEDGE_DIST="$tmp/one" scripts/release.sh "$@"
other="$tmp/another/folder with spaces/and a longer name"
mkdir -p "$other/tmp"
if [ "${KEDGE_WARM:-}" != 1 ]; then
	GOCACHE="$other/cache"
	export GOCACHE
fi
(
	umask 077
	export TMPDIR="$other/tmp" TZ=Asia/Kathmandu LANG=de_DE.UTF-8 GOAMD64=v2 CGO_CFLAGS='-O1 -g' GOMAXPROCS=1 HOSTNAME=elsewhere
	KEDGE_UNSIGNED=1 KEDGE_CLONE="$other/b" KEDGE_DIST="$tmp/two" scripts/release.sh "$@"
)
if ! diff -r "$tmp/one" "$tmp/two"; then
	echo "two builds of one commit differ" >&2
	exit 1
fi
echo "two builds of one commit are equal: $(cat "$tmp"/one/*/SHA256SUMS | grep -c .) files"
