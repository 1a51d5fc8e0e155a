package doctor

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// forwarding has kernel parameters of which pods depend, and that other programs change. A parameter that the kernel does
// not have is absent.
type forwarding struct {
	sysctls  map[string]string // as "net/ipv4/ip_forward"
	pods     int               // links of pods on this machine
	links    []string          // of pods, and to other nodes
	ipv6     bool
	writable func(name, value string) error // sets a parameter
}

const (
	ipForward   = "net/ipv4/ip_forward"
	ip6Forward  = "net/ipv6/conf/all/forwarding"
	bridgeCall  = "net/bridge/bridge-nf-call-iptables"
	strictCheck = "1" // of rp_filter
)

func judgeForwarding(s *subject, f forwarding) (found []Finding) {
	// A kedge that starts sets them. The pods of a stopped kedge go on running.
	if s.state == Running || f.pods > 0 {
		names := []string{ipForward}
		if f.ipv6 {
			names = append(names, ip6Forward)
		}
		for _, name := range names {
			if f.sysctls[name] != "0" {
				continue
			}
			dotted := strings.ReplaceAll(name, "/", ".")
			found = append(found, Finding{Level: Problem, Subject: dotted,
				What:   dotted + " is 0: pods reach nothing outside of themselves; another program has changed it after the start of kedge",
				Remedy: fmt.Sprintf("sysctl -w %s=1, and remove the other setting from /etc/sysctl.d", dotted),
				fix: func() (string, error) {
					return fmt.Sprintf("set %s to 1", dotted), f.writable(name, "1")
				}})
		}
	}
	var strict []string
	for _, link := range f.links {
		of := "net/ipv4/conf/" + link + "/rp_filter"
		all := f.sysctls["net/ipv4/conf/all/rp_filter"] // the kernel takes the larger of the two values
		if of := f.sysctls[of]; max(of, all) == strictCheck {
			strict = append(strict, link)
		}
	}
	if len(strict) > 0 {
		found = append(found, Finding{Level: Warning, Subject: "rp_filter",
			What:   fmt.Sprintf("rp_filter is strict (1) on %s: packets are dropped whose answers would take another interface", some(strict)),
			Remedy: "sysctl -w net.ipv4.conf.all.rp_filter=2"})
	}
	if s.ForeignNetwork && f.sysctls[bridgeCall] == "0" {
		found = append(found, Finding{Level: Warning, Subject: "bridge-nf-call-iptables",
			What:   "net.bridge.bridge-nf-call-iptables is 0: pods on one bridge do not reach services of each other",
			Remedy: "sysctl -w net.bridge.bridge-nf-call-iptables=1"})
	}
	return found
}

// some lists a few names.
func some(names []string) string {
	const most = 3
	if len(names) <= most {
		return strings.Join(names, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), len(names)-most)
}

// clock has what the kernel and processes say of the clock.
type clock struct {
	now      time.Time
	synced   bool
	maxError time.Duration // as the kernel estimates it
	daemon   string        // the process that keeps the clock; empty if none is known
}

// clockDaemons are programs that keep the clock, as the kernel names their processes.
var clockDaemons = []string{"chronyd", "systemd-timesyn", "ntpd", "ntpd-rs", "openntpd", "ptp4l", "phc2sys", "timemaster"}

func judgeClock(s *subject, c clock) []Finding {
	const slack = 24 * time.Hour // as at the start of kedge
	set := "set the clock with \"date -s\", and keep it right with an NTP client such as chrony"
	switch built := s.Preflight.BuildDate; {
	case !built.IsZero() && c.now.Before(built.Add(-slack)):
		return []Finding{{Level: Problem, Remedy: set, What: fmt.Sprintf("the clock shows %s, and this kedge was built on %s: kedge waits for the right time, and certificates are refused",
			c.now.UTC().Format(time.DateTime), built.UTC().Format(time.DateOnly))}}
	case c.now.Before(s.datadir.LastSeen.Add(-slack)):
		return []Finding{{Level: Problem, Remedy: set, What: fmt.Sprintf("the clock shows %s, and kedge has seen %s before: the clock was set back, and certificates that were signed since are refused",
			c.now.UTC().Format(time.DateTime), s.datadir.LastSeen.UTC().Format(time.DateTime))}}
	case !c.synced && c.daemon == "":
		return []Finding{{Level: Warning, What: "the clock is not synchronized, and no known time service runs: it drifts away from the clocks of other machines",
			Remedy: "install and start an NTP client such as chrony or systemd-timesyncd"}}
	case !c.synced:
		return []Finding{{Level: Warning, What: fmt.Sprintf("%s runs, and has not synchronized the clock (the error may be %s)", c.daemon, c.maxError.Round(time.Millisecond)),
			Remedy: "see whether it reaches its servers: \"chronyc sources\" or \"timedatectl timesync-status\""}}
	}
	return nil
}

// cgroupFacts has the cgroup of all pods.
type cgroupFacts struct {
	root    string
	missing []string // controllers, or hierarchies of version 1, in which the cgroup is absent
}

func judgeCgroup(s *subject, c cgroupFacts) []Finding {
	if len(c.missing) == 0 {
		return nil
	}
	return []Finding{{Level: Problem, What: fmt.Sprintf("the cgroup %s of all pods lacks %s: another program has removed it, and no pod starts", c.root, strings.Join(c.missing, ", ")), Remedy: s.restart()}}
}

// memory has the memory of the machine in bytes, and the share of time for which processes wait for memory.
type memory struct {
	total, available uint64
	pressure         bool // the kernel measures pressure
	some, full       float64
}

func judgeMemory(_ *subject, m memory) []Finding {
	const (
		fullProblem, someWarning = 10, 20 // percent of the last minute
		leastFree, lowFree       = 3, 8   // percent
	)
	remedy := "see \"kedge kubectl top pods -A --sort-by=memory\" or \"top -o %MEM\"; give pods limits, or the machine more memory"
	if m.pressure {
		switch {
		case m.full >= fullProblem:
			return []Finding{{Level: Problem, What: fmt.Sprintf("all processes waited for memory during %.0f %% of the last minute (/proc/pressure/memory)", m.full), Remedy: remedy}}
		case m.some >= someWarning:
			return []Finding{{Level: Warning, What: fmt.Sprintf("processes waited for memory during %.0f %% of the last minute (/proc/pressure/memory)", m.some), Remedy: remedy}}
		}
	}
	if m.total == 0 {
		return []Finding{{Level: Unknown, What: "/proc/meminfo has no MemTotal"}}
	}
	free := m.available * 100 / m.total
	what := fmt.Sprintf("only %s of %s of memory are available", size(m.available), size(m.total))
	switch {
	case free < leastFree:
		return []Finding{{Level: Problem, What: what + ": the kernel is about to kill processes", Remedy: remedy}}
	case free < lowFree:
		return []Finding{{Level: Warning, What: what, Remedy: remedy}}
	}
	return nil
}

// use is the use of a limited resource.
type use struct{ used, limit uint64 }

// full returns the level of a use: a warning at 80 percent, a problem at 95.
func (u use) full() Level {
	switch {
	case u.limit == 0 || float64(u.used) < 0.80*float64(u.limit):
		return ""
	case float64(u.used) < 0.95*float64(u.limit):
		return Warning
	}
	return Problem
}

// limits has the use of files and of inotify.
type limits struct {
	files     use // open files of kedge's process; zero if it does not run
	allFiles  use // of all processes
	instances use // of inotify, of root
	watches   use
	set       func(name, value string) error
}

// What a node sets at its start, if it may.
const (
	enoughInstances = 8192
	enoughWatches   = 524288
)

func judgeLimits(_ *subject, l limits) (found []Finding) {
	add := func(u use, subject, what, remedy string, fix func() (string, error)) {
		if level := u.full(); level != "" {
			found = append(found, Finding{Level: level, Subject: subject, What: fmt.Sprintf("%d of %d %s", u.used, u.limit, what), Remedy: remedy, fix: fix})
		}
	}
	inotify := func(u use, name string, enough uint64) (remedy string, fix func() (string, error)) {
		to := fmt.Sprint(max(enough, 2*u.limit))
		dotted := "fs.inotify." + name
		return fmt.Sprintf("sysctl -w %s=%s", dotted, to), func() (string, error) {
			return fmt.Sprintf("set %s to %s", dotted, to), l.set("fs/inotify/"+name, to)
		}
	}
	add(l.files, "open-files", "files that kedge may open are open", "raise LimitNOFILE= in the unit of kedge, and restart kedge", nil)
	add(l.allFiles, "open-files", "files that all processes together may open are open (fs.file-max)", fmt.Sprintf("sysctl -w fs.file-max=%d", 2*l.allFiles.limit), nil)
	remedy, fix := inotify(l.instances, "max_user_instances", enoughInstances)
	add(l.instances, "inotify", "inotify instances of root are in use: programs fail with \"too many open files\"", remedy, fix)
	remedy, fix = inotify(l.watches, "max_user_watches", enoughWatches)
	add(l.watches, "inotify", "inotify watches of root are in use: programs fail with \"no space left on device\"", remedy, fix)
	return found
}

func judgeConntrack(_ *subject, u use) []Finding {
	level := u.full()
	if level == "" {
		return nil
	}
	return []Finding{{Level: level, What: fmt.Sprintf("%d of %d entries for connections are in use; new connections are dropped when it is full", u.used, u.limit),
		Remedy: fmt.Sprintf("sysctl -w net.netfilter.nf_conntrack_max=%d", 2*u.limit)}}
}

// size returns bytes in the units of users.
func size(n uint64) string {
	const mebi, gibi = 1 << 20, 1 << 30
	switch {
	case n >= 10*gibi:
		return fmt.Sprintf("%d GiB", n/gibi)
	case n >= gibi:
		return fmt.Sprintf("%.1f GiB", float64(n)/gibi)
	}
	return fmt.Sprintf("%d MiB", n/mebi)
}

// setSysctl writes a kernel parameter, whose name has slashes.
func setSysctl(name, value string) error {
	return os.WriteFile(filepath.Join("/proc/sys", name), []byte(value), 0)
}
