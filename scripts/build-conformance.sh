#!/bin/sh
# Builds Kubernetes' own end-to-end suite and the images that its tests use,
# without a registry: programs come from Go modules, the rest from Debian packages.
# Files that are up to date are not built again.
set -eu
cd "$(dirname "$0")/.."
out=$PWD/build/conformance
coredns=v1.12.4 # of the images agnhost and glibc-dns-testing: a DNS server for tests

stamp=$(cat scripts/conformance/go.mod scripts/testimages/*.go scripts/testimages/musl/*.c internal/test/image/*.go "$0" | sha256sum | cut -d' ' -f1)
if [ -f "$out/stamp" ] && [ "$(cat "$out/stamp")" = "$stamp" ]; then
	exit 0
fi

if ! command -v apt-get >/dev/null; then
	echo "the images are built from Debian packages, which requires Debian or Ubuntu" >&2
	exit 1
fi
sudo=""
[ "$(id -u)" = 0 ] || sudo=sudo
$sudo apt-get update -qq

mkdir -p "$out/bin"
images=k8s.io/kubernetes/test/images
build() { go build -C scripts/conformance -ldflags '-s -w' -o "$out/bin/$1" "$2"; }
echo "building the suite"
# Some tests depend on the suite's own version.
version=$(go list -C scripts/conformance -m -f '{{.Version}}' k8s.io/kubernetes)
minor=${version#v*.}
flags="-s -w"
for p in k8s.io/component-base/version k8s.io/client-go/pkg/version; do
	flags="$flags -X $p.gitVersion=$version -X $p.gitMajor=1 -X $p.gitMinor=${minor%%.*}"
done
go test -C scripts/conformance -c -ldflags "$flags" -o "$out/e2e.test" k8s.io/kubernetes/test/e2e
build ginkgo github.com/onsi/ginkgo/v2/ginkgo
echo "building the programs of its images"
build agnhost $images/agnhost
build nonewprivs $images/nonewprivs
build regression-issue-74839 $images/regression-issue-74839
build resource-consumer $images/resource-consumer
build consume-cpu $images/resource-consumer/consume-cpu
build sample-apiserver k8s.io/sample-apiserver
build etcd go.etcd.io/etcd/server/v3
GOBIN="$out/bin" go install -ldflags '-s -w' github.com/coredns/coredns@$coredns
for tool in getent sh; do
	musl-gcc -Os -static -o "$out/bin/$tool" "scripts/testimages/musl/$tool.c"
done
cp "build/payload/$(go env GOARCH)/pause" "$out/bin/pause"
echo "building the images"
"$out/e2e.test" --list-images 2>/dev/null | go run ./scripts/testimages -programs "$out/bin" -debs "$out/debs" -o "$out/images.tar"
echo "$stamp" >"$out/stamp"
