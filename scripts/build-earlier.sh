#!/bin/sh
# Builds kedge of an earlier commit, for tests that upgrade from it.
#
#   scripts/build-earlier.sh COMMIT     prints the path of the executable, build/earlier/COMMIT/kedge
#
# Needs the repository's history up to that commit. Does nothing if the executable exists.
set -eu
cd "$(dirname "$0")/.."
commit=$1
out=$PWD/build/earlier/$commit
if [ ! -x "$out/kedge" ]; then
	if ! git cat-file -e "$commit^{commit}" 2>/dev/null; then
		echo "build-earlier: this clone has no commit $commit; fetch the history with git fetch --unshallow" >&2
		exit 1
	fi
	mkdir -p "$out"
	trap 'git worktree remove --force "$out/source" 2>/dev/null || true' EXIT
	git worktree add --quiet --detach "$out/source" "$commit"
	make -C "$out/source" build >"$out/log" 2>&1 || { tail -20 "$out/log" >&2 && exit 1; }
	mv "$out/source/bin/kedge" "$out/kedge"
fi
echo "$out/kedge"
