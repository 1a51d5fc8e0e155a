#!/bin/sh
# Builds the release of the commit that is checked out, in a clone of its own, so that nothing but the commit is in it.
#
#   scripts/release.sh [ARCH...]     default: amd64 arm64   (see `make release`)
#
# KEDGE_SIGN_KEY is the file of the secret key, or KEDGE_UNSIGNED is 1. KEDGE_CLONE is the folder of the clone, by default
# build/release, and KEDGE_DIST that of the releases, by default dist. docs/release.md describes the rest.
set -eu
cd "$(dirname "$0")/.."
[ $# != 0 ] || set -- amd64 arm64
clone=${KEDGE_CLONE:-$PWD/build/release}
dist=${KEDGE_DIST:-$PWD/dist}

# Settings of a developer would get into the executables.
export GOAMD64=v1 GOARM64=v8.0 GOEXPERIMENT='' GOFIPS140=off CGO_CFLAGS='-O2 -g' CGO_LDFLAGS='-O2 -g' LC_ALL=C TZ=UTC
unset GOTAGS CC CFLAGS LDFLAGS 2>/dev/null || true

version=$(git describe --tags --match 'v[0-9]*' --always --abbrev=12 --dirty)
if [ "${KEDGE_UNSIGNED:-}" = 1 ]; then
	signing=-unsigned
else
	signing=-sign-key=${KEDGE_SIGN_KEY:-}
fi
commit=$(git rev-parse HEAD)
date=$(git log -1 --date=format-local:%Y-%m-%dT%H:%M:%SZ --format=%cd)
go build -o build/release-tool ./scripts/release
tool() { build/release-tool -version "$version" -commit "$commit" -date "$date" "$signing" -out "$dist" "$@"; }
tool # checks that it may be signed, before everything is built
case $version in *-dirty) echo "uncommitted changes are not in the release" >&2 ;; esac
version=${version%-dirty}

rm -rf "$clone"
git clone --quiet --no-checkout . "$clone"
git -C "$clone" checkout --quiet --detach "$commit"
for arch; do
	make -C "$clone" --no-print-directory build ARCH="$arch" VERSION="$version" COMMIT="$commit" DATE="$date"
done

# The C libraries that are linked into runc.
libraries="libseccomp=$(pkg-config --modversion libseccomp)"
libraries="$libraries glibc=$(printf '#include <features.h>\n__GLIBC__ __GLIBC_MINOR__\n' | gcc -E -P - | tail -n 1 | tr ' ' .)"
tool -root "$clone" -host "$(go env GOHOSTARCH)" -libraries "$libraries" "$@"
