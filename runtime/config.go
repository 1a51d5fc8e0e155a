package runtime

import (
	"errors"
	"fmt"
	"path/filepath"
)

// Snapshotters and cgroup drivers that Config accepts.
const (
	SnapshotterOverlayFS = "overlayfs"
	SnapshotterNative    = "native"

	CgroupDriverSystemd  = "systemd"
	CgroupDriverCgroupfs = "cgroupfs"
)

// maxRunDirLen leaves room in the 108 bytes of a Unix socket's address for
// "/s/" and the 64 digits of a shim's hash; containerd accepts 42 bytes of folder.
const maxRunDirLen = 40

// Config says where a node keeps its containers and how it runs them. The zero
// value is not useful; start from DefaultConfig.
type Config struct {
	// DataDir holds images and metadata (DataDir/containerd), the unpacked shim and
	// runc (DataDir/runtime). Survives a reboot.
	DataDir string
	// RunDir holds sockets, bundles and container state. Must be empty after a
	// reboot, so a tmpfs, and short: at most 40 bytes, because shims listen there.
	RunDir string
	// ImagesDir is the folder whose archives are imported at start. Default
	// DataDir/images.
	ImagesDir string
	// NodeName appears in messages only.
	NodeName string

	// Snapshotter is overlayfs, native, or empty: overlayfs if a trial mount on
	// DataDir works, else native.
	Snapshotter string
	// CgroupDriver is systemd, cgroupfs, or empty for DetectCgroupDriver. The
	// kubelet must be given the same.
	CgroupDriver string
	// CNIConfDir and CNIBinDir are where the network plug-in's configuration and
	// program are found. containerd creates the first, and waits for a file in it.
	CNIConfDir string
	CNIBinDir  string
	// CDISpecDirs are read for devices that vendors' tools describe there. Never
	// written; the defaults are the places that such tools write to.
	CDISpecDirs []string

	// RegistriesFile is registries.yaml in the form k3s defined. It need not exist.
	RegistriesFile string
	// DisableDefaultRegistryEndpoint stops pulls from falling back to a registry's
	// own address when a mirror for it is configured.
	DisableDefaultRegistryEndpoint bool

	// UnconfinedByDefault runs containers without a seccomp profile when they name
	// none. Leave it off: the default profile is then RuntimeDefault.
	UnconfinedByDefault bool
	// EnableSELinux labels containers. Needs a host with SELinux and its policy.
	EnableSELinux bool
}

// DefaultConfig is what a node without flags runs with.
func DefaultConfig() Config {
	return Config{
		DataDir:        "/var/lib/kedge",
		RunDir:         "/run/kedge",
		CNIConfDir:     "/run/kedge/cni/net.d",
		CNIBinDir:      "/run/kedge/cni/bin",
		CDISpecDirs:    []string{"/etc/cdi", "/var/run/cdi"},
		RegistriesFile: "/etc/kedge/registries.yaml",
	}
}

// Validate reports every problem of c that can be seen without touching the system.
func (c Config) Validate() error {
	var errs []error
	for _, p := range []struct{ name, path string }{
		{"data directory", c.DataDir},
		{"run directory", c.RunDir},
		{"CNI configuration directory", c.CNIConfDir},
		{"CNI program directory", c.CNIBinDir},
	} {
		if !filepath.IsAbs(p.path) {
			errs = append(errs, fmt.Errorf("%s %q must be an absolute path", p.name, p.path))
		}
	}
	for _, p := range []struct{ name, path string }{
		{"images directory", c.ImagesDir},
		{"registries file", c.RegistriesFile},
	} {
		if p.path != "" && !filepath.IsAbs(p.path) {
			errs = append(errs, fmt.Errorf("%s %q must be an absolute path", p.name, p.path))
		}
	}
	if c.DataDir != "" && filepath.Clean(c.DataDir) == filepath.Clean(c.RunDir) {
		errs = append(errs, fmt.Errorf("data directory and run directory must differ, both are %s", c.DataDir))
	}
	if n := len(filepath.Clean(c.RunDir)); n > maxRunDirLen {
		errs = append(errs, fmt.Errorf("run directory %s is %d bytes long; use at most %d, for the kernel allows a socket 108", c.RunDir, n, maxRunDirLen))
	}
	switch c.Snapshotter {
	case "", SnapshotterOverlayFS, SnapshotterNative:
	default:
		errs = append(errs, fmt.Errorf("unknown snapshotter %q; use overlayfs or native", c.Snapshotter))
	}
	switch c.CgroupDriver {
	case "", CgroupDriverSystemd, CgroupDriverCgroupfs:
	default:
		errs = append(errs, fmt.Errorf("unknown cgroup driver %q; use systemd or cgroupfs", c.CgroupDriver))
	}
	return errors.Join(errs...)
}

// root is where containerd keeps what must survive a reboot.
func (c Config) root() string { return filepath.Join(c.DataDir, "containerd") }

// SnapshotterFile is where a node keeps its choice between overlayfs and native.
func (c Config) SnapshotterFile() string { return filepath.Join(c.root(), "snapshotter") }

// state is where containerd keeps what must not.
func (c Config) state() string { return filepath.Join(c.RunDir, "containerd") }

// tempDir is on the same file system as the images: the kernel is asked there
// whether it can map owners on overlayfs, and layers are mounted there in passing.
func (c Config) tempDir() string { return filepath.Join(c.root(), "tmp") }

// shimSocketDir is where shims listen; see maxRunDirLen for its short name.
func (c Config) shimSocketDir() string { return filepath.Join(c.RunDir, "s") }

// runcRoot is where runc keeps the state of containers.
func (c Config) runcRoot() string { return filepath.Join(c.RunDir, "runc") }

// cniCache is where the CNI library remembers what plug-ins answered.
func (c Config) cniCache() string { return filepath.Join(c.RunDir, "cni", "cache") }

// certsDir holds one hosts.toml per configured registry.
func (c Config) certsDir() string { return filepath.Join(c.state(), "certs.d") }

// payloadRoot holds one folder of unpacked programs per content hash.
func (c Config) payloadRoot() string { return filepath.Join(c.DataDir, "runtime") }

// imagesDir is ImagesDir or its default.
func (c Config) imagesDir() string {
	if c.ImagesDir != "" {
		return c.ImagesDir
	}
	return filepath.Join(c.DataDir, "images")
}

// Socket is where containerd answers, for the CRI and for its own clients.
func (c Config) Socket() string { return filepath.Join(c.state(), "containerd.sock") }
