package bundle

import (
	"fmt"
	"io"
	"strings"
)

// headFor returns the script at the begin of a bundle with the executables of several architectures, or with none: it runs
// the right executable, and tells it by an environment variable where the bundle is. It needs a POSIX shell, and uname,
// mktemp, tail, head, wc, chmod and rm, which busybox has too.
func headFor(all []Executable) io.Reader {
	// The offsets of executables depend on the length of the script, which must not depend on them.
	text := headText(all, 0)
	return strings.NewReader(headText(all, int64(len(text))))
}

func headText(all []Executable, length int64) string {
	var cases strings.Builder
	at := length
	for _, e := range all {
		offset, size := int64(0), int64(0)
		if !e.Absent {
			offset, size = at+1, e.Size // tail counts from 1
			at += e.Size
		}
		fmt.Fprintf(&cases, "%s) offset=%-20d; size=%-20d ;;\n", machines[e.Architecture], offset, size)
	}
	return fmt.Sprintf(headScript, cases.String())
}

// machines has what uname -m says, by architectures of Go.
var machines = map[string]string{"amd64": "x86_64|amd64", "arm64": "aarch64|arm64"}

// headScript ends with exit: what follows it is no text.
const headScript = `#!/bin/sh
# kedge with images, manifests and settings; see docs/air-gap.md of kedge.
case $0 in /*) file=$0 ;; *) file=$PWD/$0 ;; esac
KEDGE_BUNDLE=$file
export KEDGE_BUNDLE
case $(uname -m) in
%s*) offset=0; size=0
	echo "kedge: this bundle has no executable for $(uname -m); use the bundle for this architecture" >&2
	exit 78 ;;
esac
if [ "$size" -eq 0 ]; then
	for program in /usr/local/bin/kedge /opt/bin/kedge "$(command -v kedge)"; do
		if [ -x "$program" ]; then exec "$program" "$@"; fi
	done
	echo "kedge: this bundle has only what is new, and kedge is not installed on this machine; use the whole bundle" >&2
	exit 78
fi
dir=$(mktemp -d "${TMPDIR:-/tmp}/kedge-XXXXXX") || exit 1
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM
if ! tail -c "+$offset" "$file" | head -c "$size" >"$dir/kedge" || ! chmod 755 "$dir/kedge"; then
	echo "kedge: the executable cannot be unpacked into $dir; free some space, or set TMPDIR to another folder" >&2
	exit 1
fi
if [ "$(wc -c <"$dir/kedge")" -ne "$size" ]; then
	echo "kedge: the bundle $file is cut off; copy it again" >&2
	exit 1
fi
"$dir/kedge" "$@"
exit
`
