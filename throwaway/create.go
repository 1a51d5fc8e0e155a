package throwaway

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"kedge/internal/atomicfile"
	"kedge/internal/errorkind"
	"kedge/throwaway/machine"
)

// Config describes a cluster to be made.
type Config struct {
	Name            string
	Servers, Agents int
	Images          []string       // archives that every node imports
	Manifests       []string       // files and folders to apply
	Ports           []machine.Port // published on this machine
	Wait            time.Duration  // limit for the whole cluster to become ready
	Ephemeral       bool           // the cluster ends with this process
	DualStack       bool           // nodes, pods and services have addresses of both families
	// Program is the executable that the nodes run, and Version its version.
	Program, Version string
	// Kubeconfig is the file that the cluster's context is merged into; empty for none.
	Kubeconfig string
}

// maxNodes bounds the machines of a cluster: their addresses are from one /24.
const maxNodes = 200

// Validate returns all mistakes in the configuration.
func (c Config) Validate() error {
	errs := []error{CheckName(c.Name)}
	if c.Servers < 1 || c.Servers > 9 || c.Servers%2 == 0 {
		errs = append(errs, errorkind.BadSetting("servers", " must be 1, 3, 5, 7 or 9, not %d: more than half of the servers must agree, so an even number adds nothing", c.Servers))
	}
	if most := maxNodes - c.Servers; c.Agents < 0 || c.Agents > most {
		errs = append(errs, errorkind.BadSetting("agents", " must be between 0 and %d, not %d", most, c.Agents))
	}
	names := map[string]bool{}
	for _, path := range c.Images {
		if st, err := os.Stat(path); err != nil {
			errs = append(errs, fmt.Errorf("image archive: %w", err))
		} else if !st.Mode().IsRegular() {
			errs = append(errs, fmt.Errorf("image archive %s is not a file", path))
		}
		if base := filepath.Base(path); names[base] {
			errs = append(errs, fmt.Errorf("two image archives are called %s; rename one", base))
		} else {
			names[base] = true
		}
	}
	for _, path := range c.Manifests {
		if _, err := os.Stat(path); err != nil {
			errs = append(errs, fmt.Errorf("manifest: %w", err))
		}
	}
	if c.Wait <= 0 {
		errs = append(errs, errorkind.BadSetting("wait", " must be a positive duration, not %s", c.Wait))
	}
	return errors.Join(errs...)
}

// Create makes a cluster and returns when all of it is ready. It reports its progress by say.
// After an error nothing is left of the cluster but the end of its logs, in the error.
func (r Root) Create(ctx context.Context, cfg Config, say func(string)) (_ *Cluster, err error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	objects, err := readManifests(cfg.Manifests)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, cfg.Wait, fmt.Errorf("not ready within %s", cfg.Wait))
	defer cancel()
	release, err := r.lock(clusterLock(cfg.Name))
	if err != nil {
		return nil, err
	}
	c, err := r.begin(cfg)
	if err != nil {
		release()
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("%w%s", err, c.logTails()), c.site.Remove(), r.remove(cfg.Name))
		}
		if err == nil && cfg.Ephemeral {
			c.release = release
			return
		}
		release()
	}()
	template, err := r.template(ctx, cfg, say)
	if err != nil {
		return nil, err
	}
	say(fmt.Sprintf("starting %s", nodesInWords(cfg)))
	begin := time.Now()
	if err := c.startAll(cfg, template); err != nil {
		return nil, err
	}
	if err := c.waitReady(ctx, cfg.Servers+cfg.Agents, begin, say); err != nil {
		return nil, err
	}
	if len(objects) > 0 {
		if err := c.apply(ctx, objects, say); err != nil {
			return nil, err
		}
	}
	if cfg.Kubeconfig != "" {
		c.record.Kubeconfig = cfg.Kubeconfig
		if err := c.save(); err != nil { // before the context exists, so that it will be removed
			return nil, err
		}
		if err := c.addContext(cfg.Kubeconfig); err != nil {
			return nil, err
		}
	}
	c.record.Complete = !cfg.Ephemeral
	return c, c.save()
}

func nodesInWords(cfg Config) string {
	words := "1 server"
	if cfg.Servers > 1 {
		words = fmt.Sprint(cfg.Servers, " servers")
	}
	switch {
	case cfg.Agents == 1:
		words += " and 1 agent"
	case cfg.Agents > 1:
		words += fmt.Sprintf(" and %d agents", cfg.Agents)
	}
	return words
}

// begin records a new cluster and makes its switch. The caller holds the cluster's lock.
func (r Root) begin(cfg Config) (*Cluster, error) {
	release, err := r.lock(lockName)
	if err != nil {
		return nil, err
	}
	defer release()
	if _, err := os.Stat(r.dir(cfg.Name)); err == nil {
		return nil, fmt.Errorf("cluster %s exists already; remove it with \"kedge down %s\", or choose another name with --name", cfg.Name, cfg.Name)
	}
	subnet, err := r.freeSubnet()
	if err != nil {
		return nil, err
	}
	c := &Cluster{root: r, record: record{
		Name: cfg.Name, Created: time.Now().UTC().Truncate(time.Second), Subnet: subnet, Token: newSecret(), ServerToken: newSecret(), Next: 2,
		DualStack: cfg.DualStack,
	}}
	for _, path := range cfg.Images {
		abs, err := filepath.Abs(path)
		if err != nil {
			return nil, err
		}
		c.record.Images = append(c.record.Images, abs)
	}
	if err := os.Mkdir(c.dir(), 0o755); err != nil {
		return nil, err
	}
	if err := c.save(); err != nil {
		return nil, errors.Join(err, os.RemoveAll(c.dir()))
	}
	v4, v6 := subnetOf(subnet)
	c.site, err = machine.Create(machine.Config{
		Dir: filepath.Join(c.dir(), siteDir), Program: cfg.Program, Supervisor: cfg.Program, Tethered: cfg.Ephemeral,
		Host: []netip.Prefix{addressOf(v4, 1), addressOf(v6, 1)}, Ports: cfg.Ports,
	})
	if err != nil {
		return nil, errors.Join(err, r.remove(cfg.Name))
	}
	return c, nil
}

// startAll makes the machines and starts kedge on all of them at once: the other nodes wait
// for the first server by themselves.
func (c *Cluster) startAll(cfg Config, template string) error {
	var roles []Role
	roles = append(roles, slices.Repeat([]Role{Server}, cfg.Servers)...)
	roles = append(roles, slices.Repeat([]Role{Agent}, cfg.Agents)...)
	nodes := make([]*machine.Machine, len(roles))
	for i, role := range roles {
		var err error
		if nodes[i], err = c.addMachine(role); err != nil {
			return err
		}
	}
	if err := c.save(); err != nil {
		return err
	}
	errs := make([]error, len(nodes))
	var all sync.WaitGroup
	for i, m := range nodes {
		all.Go(func() { errs[i] = c.prepareAndStart(m, roles[i], template) })
	}
	all.Wait()
	return errors.Join(errs...)
}

// Role is the command that a node runs.
type Role string

// The roles.
const (
	Server Role = "server"
	Agent  Role = "agent"
)

// roleOf returns the role of a machine by its name.
func roleOf(name string) Role {
	if strings.HasPrefix(name, string(Server)+"-") {
		return Server
	}
	return Agent
}

// addMachine gives the cluster one more machine. The caller saves the record.
func (c *Cluster) addMachine(role Role) (*machine.Machine, error) {
	if c.record.Next > 254 {
		return nil, errors.New("the addresses of the cluster's subnet are used up; make a new cluster")
	}
	v4, v6 := subnetOf(c.record.Subnet)
	addrs := []netip.Prefix{addressOf(v4, c.record.Next), addressOf(v6, c.record.Next)}
	c.record.Next++
	// A name is not used twice: in the cluster it belongs to the key of its first machine.
	if c.record.Names == nil {
		c.record.Names = map[Role]int{}
	}
	c.record.Names[role]++
	return c.site.Add(fmt.Sprintf("%s-%d", role, c.record.Names[role]), addrs, addressOf(v4, 1).Addr(), addressOf(v6, 1).Addr())
}

// kedge's default paths on a machine.
const (
	dataDir         = "/var/lib/kedge"
	runDir          = "/run/kedge"
	configFile      = "/etc/kedge/config.yaml"
	adminKubeconfig = "/etc/kedge/kedge.yaml"
)

func (c *Cluster) prepareAndStart(m *machine.Machine, role Role, template string) error {
	data := m.Disk(dataDir)
	if err := clone(template, data); err != nil {
		return fmt.Errorf("prepare %s: %w", m.Name(), err)
	}
	for _, archive := range c.record.Images {
		if err := addImage(archive, data); err != nil {
			return fmt.Errorf("prepare %s: %w", m.Name(), err)
		}
	}
	if err := os.MkdirAll(m.Disk(filepath.Dir(configFile)), 0o755); err != nil {
		return err
	}
	if err := atomicfile.Write(m.Disk(configFile), []byte(c.settings(m, role)), 0o600); err != nil {
		return err
	}
	return start(m, role)
}

// start switches a machine on and starts kedge on it.
func start(m *machine.Machine, role Role) error {
	if err := m.PowerOn(); err != nil {
		return err
	}
	return m.StartKedge(string(role))
}

// sharedDisk are settings for a node on a disk that it shares with the host: how full the
// disk is says nothing about the node's pods and images, so none is evicted or removed.
const sharedDisk = `kubelet-arg:
- eviction-hard=memory.available<100Mi,nodefs.available<0%,nodefs.inodesFree<0%,imagefs.available<0%,imagefs.inodesFree<0%
- image-gc-high-threshold=100
`

// settings returns the configuration file of a node.
func (c *Cluster) settings(m *machine.Machine, role Role) string {
	text := fmt.Sprintf("node-ip: [%s]\n", m.Addrs()[0].Addr())
	if c.record.DualStack {
		text = fmt.Sprintf("node-ip: [%s, \"%s\"]\n", m.Addrs()[0].Addr(), m.Addrs()[1].Addr())
		if role == Server { // agents learn the ranges from servers
			text += "cluster-cidr: [10.42.0.0/16, \"fd42::/56\"]\nservice-cidr: [10.43.0.0/16, \"fd43::/112\"]\n"
		}
	}
	text += sharedDisk
	first := c.site.Machines()[0]
	switch {
	case m == first:
		return text + fmt.Sprintf("token: %s\nserver-token: %s\n", c.record.Token, c.record.ServerToken)
	case role == Server:
		text += fmt.Sprintf("token: %s\n", c.record.ServerToken)
	default:
		text += fmt.Sprintf("token: %s\n", c.record.Token)
	}
	return text + fmt.Sprintf("server: https://%s:6443\n", first.Addrs()[0].Addr())
}

// newSecret returns an unguessable secret.
func newSecret() string {
	secret := make([]byte, 16)
	rand.Read(secret) // never fails (crypto/rand)
	return hex.EncodeToString(secret)
}

// addImage puts an archive into a node's images folder: as a hard link if both are on the
// same file system, otherwise as a copy.
func addImage(archive, data string) error {
	dir := filepath.Join(data, "images")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	to := filepath.Join(dir, filepath.Base(archive))
	if _, err := os.Lstat(to); err == nil {
		return nil
	}
	if err := os.Link(archive, to); err == nil {
		return nil
	}
	return copyFile(archive, to)
}

// logTails returns the last lines of the logs of nodes whose kedge has ended, for an error.
func (c *Cluster) logTails() string {
	var tails strings.Builder
	for _, m := range c.site.Machines() {
		st, err := m.Kedge()
		if err != nil || st.Running {
			continue
		}
		log, err := os.ReadFile(m.Log())
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			continue
		}
		lines := strings.Split(strings.TrimSpace(string(log)), "\n")
		fmt.Fprintf(&tails, "\n%s ended (%s):\n  %s", m.Name(), st.Ended, strings.Join(lines[max(0, len(lines)-5):], "\n  "))
	}
	return tails.String()
}
