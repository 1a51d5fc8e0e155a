package preflight

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	leastOpenFiles  = 4096
	enoughOpenFiles = 65536

	leastInotifyInstances  = 24 // a node's own use; without them the kubelet ends the process
	enoughInotifyInstances = 512
	enoughInotifyWatches   = 65536
)

func checkOpenFiles(_ context.Context, _ Config, p probes) []finding {
	limit, err := p.openFileLimit()
	if err != nil {
		return warn("the limit of open files is unknown: "+err.Error(), "")
	}
	remedy := "raise it with LimitNOFILE= in the service, or ulimit -Hn"
	switch {
	case limit < leastOpenFiles:
		return fail(fmt.Sprintf("the process may open only %d files, and kedge needs %d", limit, leastOpenFiles), remedy)
	case limit < enoughOpenFiles:
		return warn(fmt.Sprintf("the process may open only %d files: connections fail on a busy node", limit), remedy)
	}
	return fine("%d open files", limit)
}

func checkInotify(_ context.Context, _ Config, p probes) []finding {
	if err := p.tryInotify(leastInotifyInstances); errors.Is(err, unix.EMFILE) {
		return fail(fmt.Sprintf("fewer than %d inotify instances are left: other programs use the rest", leastInotifyInstances),
			fmt.Sprintf("set the kernel parameter fs.inotify.max_user_instances to %d, or stop some of them", enoughInotifyInstances))
	}
	var found []finding
	for _, l := range []struct {
		name   string
		enough int
	}{
		{"max_user_instances", enoughInotifyInstances},
		{"max_user_watches", enoughInotifyWatches},
	} {
		text, err := p.readFile("/proc/sys/fs/inotify/" + l.name)
		if err != nil {
			return fail("inotify is missing: "+err.Error(), "use a kernel with CONFIG_INOTIFY_USER")
		}
		var have int
		if _, err := fmt.Sscan(string(text), &have); err != nil {
			continue
		}
		if have < l.enough {
			found = append(found, warn(
				fmt.Sprintf("fs.inotify.%s is %d: programs in pods that watch files fail with \"too many open files\"", l.name, have),
				fmt.Sprintf("set the kernel parameter fs.inotify.%s to %d or more, which a node does when it starts, if it is allowed to", l.name, l.enough))...)
		}
	}
	if found == nil {
		found = fine("enough inotify instances and watches")
	}
	return found
}

// nodeNamePattern matches names that the API accepts for nodes: DNS names in lower case.
var nodeNamePattern = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)

func checkNodeName(_ context.Context, c Config, p probes) []finding {
	name, remedy := c.NodeName, "choose another with --node-name"
	if name == "" {
		host, err := p.hostname()
		if err != nil {
			return fail("the machine's host name is unknown: "+err.Error(), "give one with --node-name")
		}
		name = strings.ToLower(strings.TrimSpace(host))
		remedy = "rename the machine, or give a name with --node-name"
	}
	switch {
	case name == "":
		return fail("the machine has no host name", "give one with --node-name")
	case len(name) > 253 || !nodeNamePattern.MatchString(name):
		return fail(fmt.Sprintf("node name %q is not a DNS name of lower-case letters, digits, dots and dashes", name), remedy)
	case name == "localhost" || strings.HasPrefix(name, "localhost."):
		return warn(fmt.Sprintf("node name %q is the default of many machines: a second node with it could not join", name), remedy)
	}
	return fine("%s", name)
}

// A wrong clock is not an error: kedge must start on a machine without a battery after a power
// cut, and waits for the right time where it matters.
func checkClock(_ context.Context, c Config, p probes) []finding {
	now := p.now().UTC()
	if !c.BuildDate.IsZero() && now.Before(c.BuildDate) {
		return warn(fmt.Sprintf("the clock shows %s, before this kedge was built (%s): certificates will be refused by other machines",
			now.Format(time.DateTime), c.BuildDate.UTC().Format(time.DateOnly)), "set the clock, and keep it right with NTP")
	}
	if synced, err := p.clockSynced(); err == nil && !synced {
		return warn("the clock is not synchronized: it will drift away from the clocks of other machines", "run an NTP client such as systemd-timesyncd or chrony")
	}
	return fine("%s", now.Format(time.RFC3339))
}
