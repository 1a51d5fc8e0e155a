# Words for the scripts of a day with kubectl; see kubectl_day_test.go.

fail() {
	echo "FAIL: $*" >&2
	exit 1
}

# has TEXT COMMAND...: the command succeeds and prints the text.
has() {
	text=$1
	shift
	out=$("$@" 2>&1) || fail "$* failed: $out"
	case $out in
	*"$text"*) ;;
	*) fail "$* printed: $out; want: $text" ;;
	esac
}

# is TEXT COMMAND...: the command succeeds and prints the text and nothing else.
is() {
	text=$1
	shift
	out=$("$@" 2>&1) || fail "$* failed: $out"
	[ "$out" = "$text" ] || fail "$* printed: $out; want: $text"
}

# refused TEXT COMMAND...: the command fails and says the text.
refused() {
	text=$1
	shift
	if out=$("$@" 2>&1); then fail "$* succeeded: $out"; fi
	case $out in
	*"$text"*) ;;
	*) fail "$* said: $out; want: $text" ;;
	esac
}

# eventually COMMAND...: the command succeeds within ninety seconds.
eventually() {
	end=$(($(date +%s) + 90))
	until result=$("$@" 2>&1); do
		[ "$(date +%s)" -lt $end ] || fail "after ninety seconds still: $*: $result"
		sleep 0.5
	done
}

# rolled OBJECT...: rollouts, when they are complete.
rolled() {
	for object; do kubectl rollout status "$object" --timeout=90s; done
}

# client: a pod to ask from.
client() {
	kubectl run client --image="$IMAGE" --restart=Never --command -- sleep 3600
	kubectl wait --for=condition=Ready pod/client --timeout=90s
}
