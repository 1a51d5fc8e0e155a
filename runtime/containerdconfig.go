package runtime

import (
	"path/filepath"
	goruntime "runtime"

	srvconfig "github.com/containerd/containerd/v2/cmd/containerd/server/config"
	"github.com/containerd/containerd/v2/version"
)

// Addresses of the plugins that kedge configures or insists on.
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

// table is a table of containerd's configuration file.
type table = map[string]any

// settings is what containerd must be told beyond Config: found out about the host,
// unpacked, or rendered from other files.
type settings struct {
	host        hostFeatures
	snapshotter string
	cgroup      string // driver
	shim, runc  string // paths of the unpacked programs
	pauseImage  string
	auths       map[string]table // credentials by registry host
}

// containerdConfig composes containerd's whole configuration. Every path in it is
// under DataDir or RunDir, except the CNI folders, the folders of CDI descriptions
// (read only), and what Config itself names.
func containerdConfig(c Config, s settings) *srvconfig.Config {
	registry := table{"config_path": c.certsDir()}
	configs := table{}
	for host, auth := range s.auths {
		configs[host] = table{"auth": auth}
	}
	if len(configs) > 0 {
		registry["configs"] = configs
	}
	cri := table{
		"cni": table{
			"bin_dirs": []string{c.CNIBinDir},
			"conf_dir": c.CNIConfDir,
			// Sets lo up itself; upstream otherwise runs a program called loopback.
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
		"netns_mounts_under_state_dir": true, // else /var/run/netns
		"enable_unprivileged_ports":    true,
		"enable_unprivileged_icmp":     true,
		// criu is a program of the host.
		"enable_criu": false,
		// Only the usage rate in the CRI's own statistics depends on these samples,
		// and the kubelet has its own; upstream's once a second costs CPU per container.
		"stats_collect_period":   "1m",
		"stats_retention_period": "5m",
	}
	if s.host.seccomp && !c.UnconfinedByDefault {
		cri["unset_seccomp_profile"] = "runtime/default"
	}
	return &srvconfig.Config{
		Version: version.ConfigVersion,
		Root:    c.root(),
		State:   c.state(),
		TempDir: c.tempDir(),
		DisabledPlugins: []string{
			// They count calls in the process-wide registry, where ours would meet
			// those of the API server's own gRPC, and keep a series per method.
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
			pluginCRIRuntime: cri,
			pluginCRIImages: table{
				"snapshotter":   s.snapshotter,
				"pinned_images": table{"sandbox": s.pauseImage},
				"registry":      registry,
				// The transfer service knows no credentials per registry host.
				"use_local_image_pull": true,
				// Seconds between walks over every container's writable layer.
				"stats_collect_period": 60,
			},
			// A layer is on the disk before its record is. Otherwise an image that was
			// unpacked just before the power went has empty files in it for ever.
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

// databases are containerd's bolt files, whether they exist or not.
func databases(c Config) []string {
	return []string{
		filepath.Join(c.root(), pluginMetadata, "meta.db"),
		filepath.Join(c.root(), "io.containerd.snapshotter.v1."+SnapshotterOverlayFS, "metadata.db"),
		filepath.Join(c.root(), "io.containerd.snapshotter.v1."+SnapshotterNative, "metadata.db"),
	}
}

// mountsDatabase lives in the state folder: it is only good until the next reboot,
// and losing it loses nothing that the mount table does not say as well.
func mountsDatabase(c Config) string {
	return filepath.Join(c.state(), "io.containerd.mount-manager.v1.bolt", "mounts.db")
}
