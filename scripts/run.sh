#!/bin/sh
# Boots a cluster on this machine with the executable just built, runs an
# application on it and sends it a request. Called by `make run`.
#
# The cluster is a real one with the default settings (/var/lib/kedge, port 6443);
# it continues to run. `scripts/run.sh stop` stops it and its containers.
set -eu
cd "$(dirname "$0")/.."
kedge=$PWD/bin/kedge
log=$PWD/build/run.log

step() { printf '\n\033[1m%s\033[0m\n' "$*"; }

if [ "$(id -u)" != 0 ]; then
	exec sudo "$0" "$@"
fi

if [ "${1:-}" = stop ]; then
	# The PID comes from the running process, not from a file: a PID in a file may have been reused.
	pid=$("$kedge" status -o json 2>/dev/null | sed -n 's/^ *"pid": *\([0-9]*\),*$/\1/p')
	if [ -n "$pid" ] && kill -TERM "$pid"; then
		while kill -0 "$pid" 2>/dev/null; do sleep 0.1; done
	fi
	exec "$kedge" killall
fi

if "$kedge" status >/dev/null 2>&1; then
	step "A kedge runs already; using it."
else
	step "\$ kedge server   (log: build/run.log)"
	mkdir -p build
	setsid "$kedge" server >"$log" 2>&1 </dev/null &
	pid=$!
	n=0
	until "$kedge" status >/dev/null 2>&1; do
		n=$((n + 1))
		if ! kill -0 "$pid" 2>/dev/null || [ $n -gt 300 ]; then
			cat "$log" >&2
			exit 1
		fi
		sleep 0.2
	done
fi
"$kedge" status

step "\$ kedge kubectl get nodes -o wide"
"$kedge" kubectl get nodes -o wide

step "\$ kedge images import build/hello.tar"
CGO_ENABLED=0 go run ./scripts/demo build/e2e/probe build/hello.tar
"$kedge" images import build/hello.tar

step "\$ kedge kubectl apply -f scripts/demo/hello.yaml"
"$kedge" kubectl apply -f scripts/demo/hello.yaml
"$kedge" kubectl rollout status deployment/hello --timeout=60s
"$kedge" kubectl wait service/hello --for='jsonpath={.status.loadBalancer.ingress}' --timeout=20s
"$kedge" kubectl get pods -o wide
"$kedge" kubectl get service hello

address=$("$kedge" kubectl get service/hello -o 'jsonpath={.status.loadBalancer.ingress[0].ip}')
step "\$ curl http://$address:8088/   (from this machine or any other)"
build/e2e/probe get "http://$address:8088/"

step "The same from a pod, by name:"
"$kedge" kubectl exec deployment/hello -- /hello get http://hello:8088/

cat <<EOF

The cluster continues to run. Try
  sudo $kedge kubectl get pods -A
  sudo $kedge status
and end it, with its containers, with
  make stop
EOF
