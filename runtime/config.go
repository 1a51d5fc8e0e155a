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

// maxRunDirLen is the maximum length of RunDir in bytes. A Unix socket address has 108 bytes, which must also
// hold "/s/" and the 64 digits of a shim's hash; containerd accepts a socket folder of 42 bytes.
const maxRunDirLen = 40

// Config says where a node stores its containers and how it runs them. The zero value is not valid; start from
// DefaultConfig.
type Config struct {
	// DataDir contains images and metadata (DataDir/containerd), and the unpacked shim and runc
	// (DataDir/runtime). It survives a reboot.
	DataDir string
	// RunDir contains sockets, bundles and container state. It must be empty after a reboot, so it should be on
	// a tmpfs, and its path must be at most 40 bytes long (see maxRunDirLen).
	RunDir string
	// ImagesDir is the folder whose archives are imported at start. The default is DataDir/images.
	ImagesDir string
	// NodeName is used in messages only.
	NodeName string

	// Snapshotter is overlayfs, native, or empty. If it is empty, overlayfs is used if a trial mount on DataDir
	// works, and native otherwise.
	Snapshotter string
	// CgroupDriver is systemd, cgroupfs, or empty for the result of DetectCgroupDriver. The kubelet must use
	// the same driver.
	CgroupDriver string
	// CNIConfDir and CNIBinDir are the folders of the CNI configuration and of the CNI plugin. containerd
	// creates the first, and waits for a file in it.
	CNIConfDir string
	CNIBinDir  string
	// CDISpecDirs are the folders with CDI device specifications, which containerd only reads. The defaults are
	// the standard folders of vendors' tools.
	CDISpecDirs []string

	// RegistriesFile is the path of registries.yaml, in k3s's format. The file need not exist.
	RegistriesFile string
	// DisableDefaultRegistryEndpoint stops pulls from falling back to the registry itself when a mirror for it
	// is configured.
	DisableDefaultRegistryEndpoint bool

	// UnconfinedByDefault runs containers that name no seccomp profile without one. If it is false, they get
	// the profile RuntimeDefault.
	UnconfinedByDefault bool
	// EnableSELinux labels containers. It requires a host with SELinux and the container policy.
	EnableSELinux bool
}

// DefaultConfig returns the configuration of a node without flags.
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

// Validate reports all problems of c that can be found without access to the system.
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
		errs = append(errs, fmt.Errorf("run directory %s is %d bytes long; use at most %d, because a Unix socket path may have 108", c.RunDir, n, maxRunDirLen))
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

// root is the folder for containerd's persistent data.
func (c Config) root() string { return filepath.Join(c.DataDir, "containerd") }

// SnapshotterFile is the file with the node's choice between overlayfs and native.
func (c Config) SnapshotterFile() string { return filepath.Join(c.root(), "snapshotter") }

// state is the folder for containerd's volatile data.
func (c Config) state() string { return filepath.Join(c.RunDir, "containerd") }

// tempDir is the folder for temporary files and mounts. It is on the file system of the images, because
// containerd tests there whether overlayfs supports ID-mapped mounts.
func (c Config) tempDir() string { return filepath.Join(c.root(), "tmp") }

// shimSocketDir is the folder of the shims' sockets. Its name is short because of maxRunDirLen.
func (c Config) shimSocketDir() string { return filepath.Join(c.RunDir, "s") }

// runcRoot is the folder of runc's container state.
func (c Config) runcRoot() string { return filepath.Join(c.RunDir, "runc") }

// cniCache is the folder where the CNI library caches the results of plugins.
func (c Config) cniCache() string { return filepath.Join(c.RunDir, "cni", "cache") }

// certsDir contains one hosts.toml per configured registry.
func (c Config) certsDir() string { return filepath.Join(c.state(), "certs.d") }

// payloadRoot contains one folder of unpacked programs per content hash.
func (c Config) payloadRoot() string { return filepath.Join(c.DataDir, "runtime") }

// imagesDir returns ImagesDir or its default.
func (c Config) imagesDir() string {
	if c.ImagesDir != "" {
		return c.ImagesDir
	}
	return filepath.Join(c.DataDir, "images")
}

// Socket is the path of containerd's socket, for the CRI and for containerd's own clients.
func (c Config) Socket() string { return filepath.Join(c.state(), "containerd.sock") }
