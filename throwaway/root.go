package throwaway

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"kedge/internal/atomicfile"
	"kedge/throwaway/kubeconfig"
	"kedge/throwaway/machine"
)

// Root is the folder of all clusters of this machine.
type Root string

const (
	recordName    = "cluster.json"
	lockName      = "lock"
	templateDir   = "templates"
	siteDir       = "site"
	ownKubeconfig = "kubeconfig"
	maxClusters   = 250
	maxNameBytes  = 40
)

// record is the content of cluster.json.
type record struct {
	Name        string       `json:"name"`
	Complete    bool         `json:"complete"` // false: the cluster is removed when its lock is free
	Created     time.Time    `json:"created"`
	Subnet      int          `json:"subnet"`          // see subnetOf
	Token       string       `json:"token"`           // of agents
	ServerToken string       `json:"serverToken"`     // of servers
	Next        int          `json:"next"`            // address of the next machine
	Names       map[Role]int `json:"names,omitempty"` // number of machines of each role so far
	DualStack   bool         `json:"dualStack,omitempty"`
	// Kubeconfig is the user's file with a context of this cluster.
	Kubeconfig string   `json:"kubeconfig,omitempty"`
	Images     []string `json:"images,omitempty"` // archives that every node imports
}

// Cluster is a cluster of a root.
type Cluster struct {
	root   Root
	record record
	site   *machine.Site // nil in a list
	// release releases the cluster's lock, which the maker of an ephemeral cluster holds
	// for as long as the cluster lasts; nil for other clusters.
	release func()
}

// ErrUnknown is wrapped when no cluster has the given name.
var ErrUnknown = errors.New("there is no such cluster")

var namePattern = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?$`)

// CheckName returns an error if a name is not valid for a cluster.
func CheckName(name string) error {
	if !namePattern.MatchString(name) || len(name) > maxNameBytes || name == templateDir {
		return fmt.Errorf("invalid cluster name %q; use at most %d lower-case letters, digits and dashes", name, maxNameBytes)
	}
	return nil
}

func (r Root) dir(name string) string { return filepath.Join(string(r), name) }

// lock waits for the lock of a file below the root and takes it. The end of the process, or
// release, releases the lock.
func (r Root) lock(name string) (release func(), err error) {
	return r.flock(name, unix.LOCK_EX)
}

// errBusy is returned by tryLock when the lock is taken.
var errBusy = errors.New("the lock is taken")

func (r Root) tryLock(name string) (release func(), err error) {
	release, err = r.flock(name, unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = errBusy
	}
	return release, err
}

func (r Root) flock(name string, how int) (release func(), err error) {
	path := r.dir(name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	for {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o600)
		if err != nil {
			return nil, err
		}
		if err := unix.Flock(int(f.Fd()), how); err != nil {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		// The previous holder may have removed the file; then the lock protects nothing.
		ours, err := f.Stat()
		if err == nil {
			if there, gone := os.Stat(path); gone == nil && os.SameFile(ours, there) {
				return func() { f.Close() }, nil
			}
		}
		f.Close()
		if err != nil {
			return nil, err
		}
	}
}

// clusterLock is the file that a process locks while it makes, changes or removes a cluster.
// It is beside the cluster's folder, so that both can be removed in any order.
func clusterLock(name string) string { return "." + name + "." + lockName }

// List returns all complete clusters, by name.
func (r Root) List() ([]*Cluster, error) {
	all, err := r.all()
	if err != nil {
		return nil, err
	}
	var out []*Cluster
	for _, c := range all {
		if c.record.Complete {
			out = append(out, c)
		}
	}
	return out, nil
}

// all returns the clusters that have a record.
func (r Root) all() ([]*Cluster, error) {
	records, err := filepath.Glob(filepath.Join(string(r), "*", recordName))
	if err != nil {
		return nil, err
	}
	var out []*Cluster
	for _, path := range records {
		c, err := r.read(filepath.Base(filepath.Dir(path)))
		if errors.Is(err, fs.ErrNotExist) {
			continue // removed meanwhile
		}
		if err != nil {
			return nil, err
		}
		out = append(out, c)
	}
	return out, nil
}

func (r Root) read(name string) (*Cluster, error) {
	c := &Cluster{root: r}
	data, err := os.ReadFile(filepath.Join(r.dir(name), recordName))
	if err == nil {
		err = json.Unmarshal(data, &c.record)
	}
	if err != nil {
		return nil, fmt.Errorf("read the record of cluster %s: %w", name, err)
	}
	c.record.Name = name
	return c, nil
}

// Open opens a cluster. The caller closes it.
func (r Root) Open(name string) (*Cluster, error) {
	if err := CheckName(name); err != nil {
		return nil, err
	}
	c, err := r.read(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w as %s; \"kedge ls\" lists the clusters, and --name selects one", ErrUnknown, name)
	}
	if err != nil {
		return nil, err
	}
	if c.site, err = machine.Open(filepath.Join(c.dir(), siteDir)); err != nil {
		return nil, err
	}
	return c, nil
}

// Sweep removes the leftovers of killed commands: clusters that never became complete, and
// ephemeral clusters.
func (r Root) Sweep() error {
	entries, err := os.ReadDir(string(r))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		name := e.Name()
		if !e.IsDir() { // perhaps the lock of a cluster that was never made
			name = strings.TrimSuffix(strings.TrimPrefix(name, "."), "."+lockName)
			if e.Name() != clusterLock(name) {
				continue
			}
		}
		if name == templateDir || CheckName(name) != nil {
			continue
		}
		c, err := r.read(name)
		if err == nil && c.record.Complete {
			continue
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
			continue
		}
		errs = append(errs, r.sweepOne(name))
	}
	return errors.Join(append(errs, r.sweepTemplates())...)
}

func (r Root) sweepOne(name string) error {
	release, err := r.tryLock(clusterLock(name))
	if errors.Is(err, errBusy) {
		return nil
	}
	if err != nil {
		return err
	}
	defer release()
	if c, err := r.read(name); err == nil && c.record.Complete {
		return nil // it has just become complete
	}
	return r.remove(name)
}

// remove removes a cluster in any state, its record last. The caller holds the cluster's
// lock.
func (r Root) remove(name string) error {
	dir := r.dir(name)
	if err := machine.Remove(filepath.Join(dir, siteDir)); err != nil {
		return err
	}
	if c, err := r.read(name); err == nil && c.record.Kubeconfig != "" {
		if err := kubeconfig.Drop(c.record.Kubeconfig, c.Context()); err != nil {
			return err
		}
	}
	// Only kedge's own files are left.
	for _, f := range []string{ownKubeconfig, recordName} {
		if err := os.Remove(filepath.Join(dir, f)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	return os.Remove(r.dir(clusterLock(name)))
}

// Remove removes a cluster and everything that belongs to it.
func (r Root) Remove(name string) error {
	if err := CheckName(name); err != nil {
		return err
	}
	if _, err := os.Stat(r.dir(name)); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w as %s; \"kedge ls\" lists the clusters, and --name selects one", ErrUnknown, name)
	}
	release, err := r.lock(clusterLock(name))
	if err != nil {
		return err
	}
	defer release()
	return r.remove(name)
}

// freeSubnet returns the first number whose addresses are unused on this machine. The caller
// holds the root's lock until the number is recorded.
func (r Root) freeSubnet() (int, error) {
	all, err := r.all()
	if err != nil {
		return 0, err
	}
	used := map[int]bool{}
	for _, c := range all {
		used[c.record.Subnet] = true
	}
	routes, err := netlink.RouteList(nil, netlink.FAMILY_V4)
	if err != nil {
		return 0, fmt.Errorf("list the routes of this machine: %w", err)
	}
	for n := 1; n <= maxClusters; n++ {
		v4, _ := subnetOf(n)
		free := !used[n]
		for _, route := range routes {
			if route.Dst == nil {
				continue
			}
			addr, _ := netip.AddrFromSlice(route.Dst.IP)
			bits, _ := route.Dst.Mask.Size()
			if bits > 0 && netip.PrefixFrom(addr.Unmap(), bits).Overlaps(v4) {
				free = false
			}
		}
		if free {
			return n, nil
		}
	}
	return 0, errors.New("all addresses of 10.89.0.0/16, the range of throwaway clusters, are in use on this machine; remove clusters with \"kedge down\"")
}

// subnetOf returns the subnets of a cluster's machines. The first address of each is the host's.
func subnetOf(n int) (v4, v6 netip.Prefix) {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 89, byte(n), 0}), 24),
		netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfd, 'k', 'e', 'd', 'g', 'e', 0, byte(n)}), 64)
}

// addressOf returns the n-th address of a subnet, with the subnet's length.
func addressOf(subnet netip.Prefix, n int) netip.Prefix {
	raw := subnet.Addr().AsSlice()
	raw[len(raw)-1] = byte(n)
	addr, _ := netip.AddrFromSlice(raw)
	return netip.PrefixFrom(addr, subnet.Bits())
}

func (c *Cluster) dir() string { return c.root.dir(c.record.Name) }

// save writes the record. The caller holds the cluster's lock.
func (c *Cluster) save() error {
	data, err := json.MarshalIndent(c.record, "", "  ")
	if err != nil {
		return err
	}
	return atomicfile.Write(filepath.Join(c.dir(), recordName), append(data, '\n'), 0o600)
}

// Name is the cluster's name.
func (c *Cluster) Name() string { return c.record.Name }

// Created is the time at which the cluster was made.
func (c *Cluster) Created() time.Time { return c.record.Created }

// Context is the name of the cluster in kubeconfigs.
func (c *Cluster) Context() string { return "kedge-" + c.record.Name }

// Kubeconfig is the path of a kubeconfig with this cluster only.
func (c *Cluster) Kubeconfig() string { return filepath.Join(c.dir(), ownKubeconfig) }

// Site is the site of the cluster's machines.
func (c *Cluster) Site() *machine.Site { return c.site }

// Close ends this process's use of the cluster, and removes an ephemeral cluster.
func (c *Cluster) Close() error {
	if c.release == nil {
		return c.site.Close()
	}
	defer c.release()
	return errors.Join(c.site.Remove(), c.root.remove(c.record.Name))
}
