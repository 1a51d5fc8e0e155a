package runtime

import (
	"path/filepath"
	goruntime "runtime"

	srvconfig "github.com/containerd/containerd/v2/cmd/containerd/server/config"
	"github.com/containerd/containerd/v2/version"
)

// IDs of the containerd plugins that kedge configures or requires.
const (
	pluginGRPC       = "io.containerd.server.v1.grpc"
	pluginTTRPC      = "io.containerd.server.v1.ttrpc"
	pluginCRI        = "io.containerd.grpc.v1.cri"
	pluginCRIRuntime = "io.containerd.cri.v1.runtime"
	pluginCRIImages  = "io.containerd.cri.v1.images"
	pluginShims      = "io.containerd.shim.v1.manager"
	pluginTransfer   = "io.containerd.transfer.v1.local"
	pluginDiff       = "io.containerd.service.v1.diff-service"
	pluginMetadata   = "io.containerd.metadata.v1.bolt"
)

// table is a table of containerd's TOML configuration.
type table = map[string]any

// settings has the values of containerd's configuration that do not come from Config: detected on the host,
// unpacked, or read from other files.
type settings struct {
	host        hostFeatures
	snapshotter string
	cgroup      string // cgroup driver
	shim, runc  string // paths of the unpacked programs
	pauseImage  string
	auths       map[string]table // credentials by registry host
}

// containerdConfig returns containerd's whole configuration. Every path in it is under DataDir or RunDir,
// except the CNI folders, the CDI folders (read only), and the paths in Config.
func containerdConfig(c Config, s settings) *srvconfig.Config {
	return &srvconfig.Config{
		Version: version.ConfigVersion,
		Root:    c.root(),
		State:   c.state(),
		TempDir: c.tempDir(),
		DisabledPlugins: []string{
			// These plugins count calls in the process-wide metrics registry, where they would collide with the
			// gRPC metrics of the API server, and keep one series per method.
			"io.containerd.metrics.v1.grpc-prometheus",
			"io.containerd.metrics.v1.grpc-otel",
		},
		RequiredPlugins: []string{
			pluginGRPC, pluginTTRPC, pluginCRI, pluginCRIRuntime, pluginCRIImages, pluginMetadata,
			"io.containerd.snapshotter.v1." + s.snapshotter,
		},
		Timeouts: map[string]string{"io.containerd.timeout.bolt.open": "10s"},
		Plugins: table{
			pluginGRPC:  table{"address": c.Socket()},
			pluginTTRPC: table{"address": c.Socket() + ".ttrpc"},
			pluginShims: table{"socket_dir": c.shimSocketDir()},
			pluginCRI: table{
				"disable_tcp_service":   true,
				"stream_server_address": "127.0.0.1",
				"stream_server_port":    "0",
			},
			pluginCRIRuntime: criRuntimeConfig(c, s),
			pluginCRIImages: table{
				"snapshotter":   s.snapshotter,
				"pinned_images": table{"sandbox": s.pauseImage},
				"registry":      registryConfig(c, s),
				// The transfer service has no credentials per registry host.
				"use_local_image_pull": true,
				// Seconds between two walks over the writable layers of all containers.
				"stats_collect_period": 60,
			},
			// A layer is synced to disk before its record is written. Otherwise an image that was unpacked just
			// before a power failure would have empty files for ever.
			pluginDiff: table{"sync_fs": true},
			pluginTransfer: table{
				"config_path": c.certsDir(),
				"unpack_config": []table{{
					"platform":    "linux/" + goruntime.GOARCH,
					"snapshotter": s.snapshotter,
				}},
			},
		},
	}
}

// criRuntimeConfig returns the configuration of pods and containers.
func criRuntimeConfig(c Config, s settings) table {
	cri := table{
		"cni": table{
			"bin_dirs": []string{c.CNIBinDir},
			"conf_dir": c.CNIConfDir,
			// containerd sets up lo itself; the default is to run the CNI plugin "loopback".
			"use_internal_loopback": true,
		},
		"containerd": table{
			"default_runtime_name": "runc",
			"runtimes": table{
				"runc": table{
					"runtime_type": "io.containerd.runc.v2",
					"runtime_path": s.shim,
					"sandboxer":    "podsandbox",
					"options": table{
						"BinaryName":    s.runc,
						"Root":          c.runcRoot(),
						"SystemdCgroup": s.cgroup == CgroupDriverSystemd,
					},
				},
			},
		},
		"cdi_spec_dirs":                c.CDISpecDirs,
		"disable_apparmor":             !s.host.appArmor,
		"restrict_oom_score_adj":       !s.host.mayLowerOOMScore,
		"enable_selinux":               c.EnableSELinux,
		"netns_mounts_under_state_dir": true, // instead of /var/run/netns
		"enable_unprivileged_ports":    true,
		"enable_unprivileged_icmp":     true,
		// CRIU is a program of the host.
		"enable_criu": false,
		// Only the CPU usage rate in the CRI's own statistics depends on these samples, and the kubelet
		// computes its own. The default of one sample per second costs CPU time per container.
		"stats_collect_period":   "1m",
		"stats_retention_period": "5m",
	}
	if s.host.seccomp && !c.UnconfinedByDefault {
		cri["unset_seccomp_profile"] = "runtime/default"
	}
	return cri
}

// registryConfig returns the sources of images and the credentials for them.
func registryConfig(c Config, s settings) table {
	registry := table{"config_path": c.certsDir()}
	configs := table{}
	for host, auth := range s.auths {
		configs[host] = table{"auth": auth}
	}
	if len(configs) > 0 {
		registry["configs"] = configs
	}
	return registry
}

// databases returns the paths of containerd's bolt databases, whether they exist or not. The first is the
// metadata database.
func databases(c Config) []string {
	return []string{
		filepath.Join(c.root(), pluginMetadata, "meta.db"),
		filepath.Join(c.root(), "io.containerd.snapshotter.v1."+SnapshotterOverlayFS, "metadata.db"),
		filepath.Join(c.root(), "io.containerd.snapshotter.v1."+SnapshotterNative, "metadata.db"),
	}
}

// mountsDatabase returns the path of the mount manager's database. It is in the state folder because it is
// valid only until the next reboot; after its loss the mount table still has the same information.
func mountsDatabase(c Config) string {
	return filepath.Join(c.state(), "io.containerd.mount-manager.v1.bolt", "mounts.db")
}
