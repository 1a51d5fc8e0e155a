#!/bin/bash
# Runs the end-to-end tests, one package after the other: their nodes share the machine's ports, routes and control groups.
# Further arguments are for go test. Without a package's name go test shows at once what the tests print, and what a run that
# passes has skipped.
#
# usage: scripts/e2e.sh [-run REGEXP]   (see `make e2e`)
#
# Needs root, the executable and the programs of the tests' images (`make build build-e2e`).
set -uo pipefail
cd "$(dirname "$0")/e2e" || exit
limit=$((75 * 60)) # seconds for all packages together: three times what a quiet machine needs

failed=()
for tests in */main_test.go; do
	package=${tests%/*}
	left=$((limit - SECONDS))
	if [ $left -le 0 ]; then
		echo "FAIL: no time is left for $package: all packages together have $((limit / 60)) minutes" >&2
		failed+=("$package")
		continue
	fi
	if ! (cd "$package" && go test -count=1 -timeout "${left}s" "$@"); then
		failed+=("$package")
		[ -z "${KEDGE_KEEP:-}" ] || break # the node that is kept has the ports
	fi
done
if [ ${#failed[@]} != 0 ]; then
	echo "FAIL: end-to-end tests of: ${failed[*]}" >&2
	exit 1
fi
