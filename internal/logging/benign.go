package logging

import "sync/atomic"

// benign are lines that the embedded components log as errors or warnings on a
// healthy node, word for word. They become debug: always, or only until the start
// is over, when the same words mean trouble.
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
	"Failed to ensure process in container with oom score": {false, "a process namespace without init, as in containers"},

	"Failed to ensure lease exists, will retry": {true, "namespaces are made after the API server starts"},
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
	"Failed to read data from checkpoint":                                                   {true, "there is none before the first pod"},
}

// settled is set when the start is over, stopping when a stop was asked for.
var settled, stopping atomic.Bool

// Settled says that the start is over: lines that are only noise while everything
// comes up are shown from now on.
func Settled() { settled.Store(true) }

// Stopping says that a stop was asked for: that one embedded component misses
// another, which went first, is no news from now on. Who does not stop is said by
// the lifecycle.
func Stopping() { stopping.Store(true) }

func isBenign(message string) bool {
	if stopping.Load() {
		return true
	}
	b, ok := benign[message]
	return ok && (!b.startOnly || !settled.Load())
}
