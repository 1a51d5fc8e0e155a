#!/bin/bash
# Tests the datastore with etcd's failpoints, which are comments in etcd's source: copies of its modules, in which the comments
# are code, take the place of the modules. kedge's own go.mod does not change. With arguments, they are those of the test.
set -euo pipefail
cd "$(dirname "$0")/.."

GOFAIL=go.etcd.io/gofail@v0.2.0
dir=$PWD/build/failpoints
rm -rf "$dir"
mkdir -p "$dir"
cp go.mod go.sum "$dir"

# The versions are those in go.mod.
for module in go.etcd.io/etcd/server/v3 go.etcd.io/bbolt; do
	copy=$dir/${module#go.etcd.io/} # gofail takes the last folder for the package's name
	mkdir -p "$(dirname "$copy")"
	cp -r "$(go list -m -f '{{.Dir}}' "$module")" "$copy"
	chmod -R u+w "$copy"
	rm -rf "$copy/tests" "$copy/cmd"
	mapfile -t packages < <(grep -rl --include='*.go' '// gofail: ' "$copy" | xargs -n1 dirname | sort -u)
	GOFLAGS='' go run "$GOFAIL" enable "${packages[@]}"
	go mod edit -replace "$module=$copy" "$dir/go.mod"
done
go mod edit -require "$GOFAIL" "$dir/go.mod"

go test -modfile="$dir/go.mod" -mod=mod -c -o "$dir/datastore.test" ./datastore
cd datastore
KEDGE_TEST_FAILPOINTS=1 exec "$dir/datastore.test" -test.timeout 60m -test.v -test.run 'TestFailpoints$' "$@"
