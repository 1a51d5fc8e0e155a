package doctor

import (
	"context"
	"fmt"
	"strings"
	"time"

	"kedge/internal/control"
	"kedge/internal/lifecycle"
)

// starting is how long a component may take to start before that is a finding.
const starting = time.Minute

func readComponents(_ context.Context, s *subject) ([]lifecycle.Status, error) {
	if s.state != Running {
		return nil, skip("kedge is not running")
	}
	return s.report.Components, nil
}

func judgeComponents(s *subject, all []lifecycle.Status) (found []Finding) {
	const recent = 10 * time.Minute
	for _, c := range all {
		f := Finding{Subject: "component " + c.Name, Remedy: "\"kedge status\" and " + s.log() + " say more"}
		switch {
		case c.State == lifecycle.Ready && c.Error != "":
			f.Level, f.What = Problem, c.Error
		case c.State == lifecycle.Ready && c.Restarts > 0 && s.now.Sub(c.FailedAt) < recent:
			f.Level, f.Since = Warning, c.FailedAt
			f.What = fmt.Sprintf("it works again, and has failed: %s", c.LastError)
			if c.Restarts > 1 {
				f.What = fmt.Sprintf("it works again, and has failed %d times, last with: %s", c.Restarts, c.LastError)
			}
		case c.State == lifecycle.Ready:
			continue
		case c.Error != "":
			f.Level, f.Since, f.What = Problem, c.Since, fmt.Sprintf("it is %s: %s", c.State, c.Error)
		case s.now.Sub(c.Since) < starting:
			f.Level, f.Since, f.What = Warning, c.Since, fmt.Sprintf("it is %s", c.State)
			f.Remedy = "wait a minute"
			if c.Detail != "" { // of a step before the components run
				f.What += ": " + c.Detail
			}
		default:
			f.Level, f.Since, f.What = Problem, c.Since, fmt.Sprintf("it is %s", c.State)
			if c.Detail != "" {
				f.What += ": " + c.Detail
			}
			if names := unready(c.After, all); names != "" {
				f.What += ", and needs " + names
			}
		}
		found = append(found, f)
	}
	return found
}

// unready returns the names of components that are not ready.
func unready(names []string, all []lifecycle.Status) string {
	var bad []string
	for _, c := range all {
		for _, n := range names {
			if c.Name == n && c.State != lifecycle.Ready {
				bad = append(bad, n)
			}
		}
	}
	return strings.Join(bad, ", ")
}

func readServers(ctx context.Context, s *subject) (all []control.ListedServer, err error) {
	switch {
	case s.state != Running:
		return nil, skip("kedge is not running")
	case s.Kubeconfig == "":
		return nil, skip("this machine is an agent")
	}
	err = control.Get(ctx, s.RunDir, control.ServersPath, nil, &all)
	return all, err
}

func judgeServers(_ *subject, all []control.ListedServer) (found []Finding) {
	for _, server := range all {
		if server.Reachable {
			continue
		}
		found = append(found, Finding{Level: Problem, Subject: "server " + server.Name, Since: server.LastSeen,
			What:   fmt.Sprintf("it does not answer at %s", strings.Join(server.Addresses, ", ")),
			Remedy: fmt.Sprintf("start kedge there, and see that the port of the datastore's members is open between the servers; \"kedge server remove %s\" if it is gone for ever", server.Name)})
	}
	return found
}
