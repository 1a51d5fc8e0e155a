package doctor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"kedge/internal/control"
	"kedge/preflight"
)

// Limits of the checks.
const (
	quick    = 3 * time.Second
	slow     = 10 * time.Second // many files or requests
	answerIn = 5 * time.Second  // of the running process, which asks each component for at most two seconds
)

// checks has all checks.
func checks() []check {
	return []check{
		newCheck("preflight", 20*time.Second, readPreflight, judgePreflight),
		newCheck("settings", quick, readNothing, judgeSettings),
		newCheck("kedge", quick, readNothing, judgeProcess),
		newCheck("components", quick, readComponents, judgeComponents),
		newCheck("servers", answerIn, readServers, judgeServers),
		newCheck("join", answerIn, readJoin, judgeJoin),
		newCheck("forwarding", quick, readForwarding, judgeForwarding),
		newCheck("clock", quick, readClock, judgeClock),
		newCheck("cgroup", quick, readCgroup, judgeCgroup),
		newCheck("memory-pressure", quick, readMemory, judgeMemory),
		newCheck("limits", slow, readLimits, judgeLimits),
		newCheck("conntrack", quick, readConntrack, judgeConntrack),
		newCheck("name-servers", quick, readNameServers, judgeNameServers),
		newCheck("ports", slow, readPorts, judgePorts),
		newCheck("firewall", slow, readFirewall, judgeFirewall),
		newCheck("mtu", quick, readMTU, judgeMTU),
		newCheck("certificates", slow, readCertificates, judgeCertificates),
		newCheck("disk", quick, readDisks, judgeDisks),
		newCheck("sync", syncBound+quick, readSync, judgeSync),
		newCheck("cluster", slow, readCluster, judgeCluster),
	}
}

func readNothing(context.Context, *subject) (struct{}, error) { return struct{}{}, nil }

// examine finds out whether kedge runs.
func examine(ctx context.Context, c Config) *subject {
	s := &subject{Config: c, now: time.Now(), state: Absent}
	if data, err := os.ReadFile(filepath.Join(c.DataDir, "kedge.json")); err == nil {
		s.state = Stopped
		_ = json.Unmarshal(data, &s.datadir) // the start refuses a damaged file, and names it
		if s.datadir.NodeName != "" {
			s.NodeName = s.datadir.NodeName
		}
	}
	if st, err := os.Stat(filepath.Join(c.DataDir, "disk-probe")); err == nil { // written every 30 seconds
		s.alive = st.ModTime()
	}
	s.unit = c.HasUnit()
	ctx, cancel := context.WithTimeout(ctx, answerIn)
	defer cancel()
	report, err := control.GetReport(ctx, c.RunDir)
	switch {
	case err == nil:
		s.state, s.report = Running, report
		s.Preflight.Running = report.PID
	case !errors.Is(err, control.ErrNotRunning):
		s.silent = err
	}
	s.Preflight.Exists = s.state != Absent
	return s
}

// HasUnit reports whether systemd has a unit for kedge.
func (c Config) HasUnit() bool {
	return slices.ContainsFunc([]string{"/etc/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system", "/run/systemd/system"}, func(dir string) bool {
		_, err := os.Stat(filepath.Join(dir, "kedge.service"))
		return err == nil
	})
}

// replaced are results of preflight about which this package has a check of its own, with more facts.
var replaced = []string{"clock", "ports", "disk-space", "firewall", "inotify"}

func readPreflight(ctx context.Context, s *subject) ([]preflight.Result, error) {
	if s.SettingsError != nil {
		return nil, skip("the settings have errors")
	}
	results := preflight.Run(ctx, s.Preflight)
	return results, ctx.Err()
}

func judgePreflight(s *subject, results []preflight.Result) (found []Finding) {
	for _, r := range results {
		if r.Level == preflight.OK || slices.Contains(replaced, r.Check) {
			continue
		}
		if r.Check == "open-files" && (s.state == Running || s.unit) {
			continue // the limit is of this process, and kedge has its own
		}
		level := Warning
		if r.Level == preflight.Error {
			level = Problem
		}
		found = append(found, Finding{Level: level, Subject: r.Check, What: r.Message, Remedy: r.Remedy})
	}
	return found
}

func judgeSettings(s *subject, _ struct{}) []Finding {
	if s.SettingsError == nil {
		return nil
	}
	return []Finding{{Level: Problem, What: "kedge does not start: " + s.SettingsError.Error(), Remedy: "correct the setting"}}
}

// joinFacts says why a machine that has not joined its cluster cannot do so.
type joinFacts struct {
	server error // of the request to the server
}

func readJoin(ctx context.Context, s *subject) (joinFacts, error) {
	if !s.Joins {
		return joinFacts{}, skip("this machine has joined its cluster, or made it")
	}
	if s.AskServer == nil {
		return joinFacts{}, nil
	}
	return joinFacts{s.AskServer(ctx)}, nil
}

func judgeJoin(s *subject, j joinFacts) []Finding {
	create := "create a token with \"kedge token create\" on a server, and give it with --token or --token-file"
	switch {
	case s.TokenError != "":
		return []Finding{{Level: Problem, What: "this machine has not joined its cluster, and cannot: " + s.TokenError, Remedy: create}}
	case j.server != nil:
		return []Finding{{Level: Problem, What: "this machine has not joined its cluster, and cannot: " + j.server.Error(), Remedy: "see that the server runs and is reached, and that --server and the token are of the same cluster"}}
	}
	return []Finding{{Level: Warning, What: "this machine has not joined its cluster yet; the server answers, and is the one that the token names",
		Remedy: "see with \"kedge token ls\" on a server whether the token has expired; if so, " + create}}
}

func judgeProcess(s *subject, _ struct{}) []Finding {
	switch {
	case s.silent != nil:
		return []Finding{{Level: Problem, What: fmt.Sprintf("kedge does not answer at %s: %v", control.Socket(s.RunDir), s.silent), Remedy: "see " + s.log() + "; " + s.restart()}}
	case s.state == Stopped:
		start := "start it with \"kedge server\" or \"kedge agent\""
		if s.unit {
			start = "systemctl start kedge"
		}
		return []Finding{{Level: Problem, What: "kedge is not running", Since: s.alive, Remedy: start + "; " + s.log() + " has the reason for which it stopped"}}
	case s.state == Running && s.Version != "" && s.report.Version != s.Version:
		return []Finding{{Level: Warning, Since: s.report.Started, Remedy: s.restart(),
			What: fmt.Sprintf("the running kedge is %s, and this program is %s", s.report.Version, s.Version)}}
	}
	return nil
}
