package logging

import (
	"log/slog"
	"strings"
	"sync/atomic"
	"time"
)

// benign has lines that the embedded components log as errors or warnings on a healthy node,
// word for word. They become debug: always, or only until the start is over, after which the
// same line means trouble.
var benign = map[string]struct {
	startOnly bool
	why       string
}{
	"The manifest file is empty, ignoring.":                           {false, "an option for metrics that is not given"},
	"Duplicate informer registration - metrics will not be published": {false, "the scheduler's own informer for pods stands beside the general one"},
	"Found stale data, removed previous endpoints on kubernetes service, apiserver didn't exit successfully previously": {
		false, "kedge publishes the endpoints of the service itself"},
	"eviction manager: failed to check if we have separate container filesystem. Ignoring.": {false, "containerd answers this through the CRI instead"},
	"Error on socket receive":                              {false, "how every exec, attach and port-forward over a WebSocket ends"},
	"failed check for fsverity support":                    {false, "an option of the file system that is used where it exists"},
	"Failed to set rlimit on max file handles":             {false, "the check of the machine reports it, with a remedy"},
	"failed to sync with latest state: context canceled":   {false, "the watching client has gone"},
	"Failed to ensure process in container with oom score": {false, "a process namespace without init, as in containers"},

	"failed to query shim pids, keeping shim registered": {false, "kedge's shim keeps the exit code of a container that ended while kedge was away"},

	"failed to read memory cgroup limits for the pod": {false, "the control group of a pod that has ended is asked for its settings"},
	"failed to read memory cgroup config for the pod": {false, "the same"},

	"Failed to ensure lease exists, will retry": {true, "namespaces are made after the API server starts"},
	"Error while syncing ConfigMap":             {true, "the same"},
	"failed to load cni during init, please check CRI plugin status before setting up network for pods": {
		true, "the ranges for pods come later, from the API"},
	"Failed to update node PodCIDR after multiple attempts":                                 {true, "the controller looked at a copy of the node from before it gave the range"},
	"CIDR assignment for node failed. Releasing allocated CIDR":                             {true, "the same"},
	"Error processing node work item":                                                       {true, "the same"},
	"Error getting the current node from lister":                                            {true, "the node is being registered"},
	"Unable to register mirror pod because node is not registered yet":                      {true, "the node is being registered"},
	"Failed to get node when trying to set owner ref to the node lease":                     {true, "the node is being registered"},
	"Error updating node status, will retry":                                                {true, "the node is being registered"},
	"Eviction manager: failed to get summary stats":                                         {true, "the node is being registered"},
	"Skipping pod synchronization":                                                          {true, "the runtime has not been asked yet"},
	"Image garbage collection failed once. Stats initialization may not have completed yet": {true, "nothing has been measured yet"},
	"Failed to read data from checkpoint":                                                   {true, "there is no checkpoint before the first pod"},
}

// benignParts has the same for lines that are known by a part of the message or of a value.
var benignParts = []struct {
	part      string
	startOnly bool
	why       string
}{
	{"no relationship found between node", false, "the kubelet asks for a pod that has been deleted, or of which the node authorizer has not heard yet"},
	{"an error occurred when try to find container", false, "it was removed between the list in which it was and the question for it"},
	{"RecentStats: unable to find data in memory cache", false, "a control group is too new to have been measured"},
	{"failed to reload cni configuration after receiving fs change event(REMOVE", true, "the configuration is written anew at each start"},
	{"node updates may not change podCIDR except from", false, "the controller looked at a copy of a node that has just joined from before it gave it the range"},
	{"Failed to initialize CSINode: error updating CSINode annotation: timed out waiting for the condition; caused by: nodes ", true,
		"the node is being registered, on a slow machine"},
}

// outage has parts of lines that embedded components log as errors, again and again, while a
// server has no leader. The cause is logged once, elsewhere.
var outage = []string{
	"etcdserver: ", "raft", "leader", // the store's own words
	"context deadline exceeded", "context canceled", "imeout", "timed out", "imed-out",
	"connection refused", "connection reset", "connection lost", "no route to host", "network is unreachable", "EOF",
	"the server is currently unable", "apiserver not ready", "storage is (re)initializing", "healthz check failed", "readyz check failed",
}

// settled is set when the start is over, and stopping when a stop was requested.
var settled, stopping atomic.Bool

// interrupted is the end of the outage in nanoseconds since 1970; zero if there was none.
var interrupted atomic.Int64

// aftermath is the time that components need to recover after an outage.
const aftermath = 5 * time.Second

// Settled must be called when the start is over: lines that are noise only during the start
// are shown from then on.
func Settled() { settled.Store(true) }

// Stopping must be called when a stop begins: from then on embedded components miss others
// that have already stopped. Package lifecycle reports components that do not stop.
func Stopping() { stopping.Store(true) }

// Interrupted must be called when this server loses its leader, or has one again. Embedded
// components' lines about a missing leader are debug meanwhile, and for some seconds more; the
// caller logs the cause once.
func Interrupted(is bool) {
	until := time.Now().Add(aftermath).UnixNano()
	if is {
		until = 1<<63 - 1
	}
	interrupted.Store(until)
}

// IsInterrupted reports whether lines about a missing leader are expected.
func IsInterrupted() bool {
	until := interrupted.Load()
	return until != 0 && time.Now().UnixNano() < until
}

// isBenign reports whether a warning or an error of an embedded component is expected.
func isBenign(r slog.Record, message string) bool {
	if stopping.Load() {
		return true
	}
	if b, ok := benign[message]; ok && (!b.startOnly || !settled.Load()) {
		return true
	}
	for _, b := range benignParts {
		if (!b.startOnly || !settled.Load()) && contains(r, message, b.part) {
			return true
		}
	}
	return IsInterrupted() && contains(r, message, outage...)
}

// contains reports whether one of the parts is in the message or in a value.
func contains(r slog.Record, message string, parts ...string) bool {
	in := func(text string) bool {
		for _, part := range parts {
			if strings.Contains(text, part) {
				return true
			}
		}
		return false
	}
	found := in(message)
	r.Attrs(func(a slog.Attr) bool {
		found = found || in(a.Value.String())
		return !found
	})
	return found
}
