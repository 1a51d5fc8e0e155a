package doctor

import (
	"context"
	"net/netip"
	"time"

	"kedge/internal/control"
	"kedge/internal/datadir"
	"kedge/preflight"
)

// Port is a port of kedge, and the setting with which it is changed.
type Port struct {
	preflight.Port
	Flag string // such as "--https-listen-port"
}

// Config describes the node that the machine has or would have.
type Config struct {
	Version         string // of this executable
	DataDir, RunDir string
	NodeName        string
	NodeIPs         []netip.Addr
	Kubeconfig      string // the administrator's; empty on a machine without a control plane
	ResolvConf      string // the file with the name servers of the host
	CgroupRoot      string // parent of the cgroups of all pods; empty without a node
	Overhead        int    // bytes that the backend adds to packets between nodes
	ForeignNetwork  bool   // another program makes the network of pods
	Store           bool   // a control plane with a datastore runs here
	Joins           bool   // the machine joins a server, and has not yet done so
	TokenError      string // why the join token of such a machine cannot be used
	// AskServer asks the server that such a machine joins for the authority that the token names. Nil without a token.
	AskServer func(context.Context) error
	Ports     []Port
	Backend   Port // of packets between nodes; number 0 if the backend does not wrap them
	Peer      Port // of connections between the datastores of several servers; number 0 without a datastore
	Preflight preflight.Config
	// SettingsError says that kedge does not start with these settings. The other fields then have what is known.
	SettingsError error
}

// State says whether kedge runs on the machine.
type State string

const (
	Running State = "running"
	Stopped State = "stopped" // the data directory has a node
	Absent  State = "absent"  // no node was ever started with the data directory
)

// subject is the machine that is examined: its configuration, and what is known before the checks.
type subject struct {
	Config
	now     time.Time
	state   State
	report  control.Report      // of the running process
	silent  error               // why a process with the run directory does not answer
	datadir datadir.Description // zero if absent
	alive   time.Time           // when a kedge last wrote to the data directory; zero if unknown
	unit    bool                // systemd has a unit kedge.service
}

func (s *subject) node() bool { return !s.Preflight.NoNode }

// restart is the command that starts or restarts kedge.
func (s *subject) restart() string {
	switch {
	case s.unit:
		return "systemctl restart kedge"
	case s.Kubeconfig == "":
		return "stop kedge and start it again with \"kedge agent\""
	}
	return "stop kedge and start it again with \"kedge server\""
}

// log is the command that shows the log.
func (s *subject) log() string {
	if s.unit {
		return "journalctl -u kedge"
	}
	return "the log of kedge"
}
