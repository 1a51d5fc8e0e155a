package agent

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"strconv"
	"strings"

	pluginapi "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"

	"kedge/agent/stalesocket"
	"kedge/internal/cgroup"
	"kedge/internal/mounts"
)

// Prepare makes the cgroup of the node's pods and claims it for this process. It is
// called once, before anything else makes kernel objects in the node's name; release
// gives the claim back.
func Prepare(ctx context.Context, cfg Config) (release func() error, err error) {
	if cfg.SystemdCgroups {
		err = cgroup.EnsureSlice(ctx, cfg.CgroupRoot)
	} else {
		err = cgroup.Ensure(cfg.CgroupRoot)
	}
	if err != nil {
		return nil, err
	}
	return cgroup.Claim(cfg.cgroupPath())
}

// leastLimits are what the kernel must allow for a full node: at its own defaults
// programs in pods fail with "too many open files" from a few dozen on, and a second
// node of the same machine does not start.
var leastLimits = map[string]uint64{
	"/proc/sys/fs/inotify/max_user_instances": 8192,
	"/proc/sys/fs/inotify/max_user_watches":   524288,
}

// RaiseLimits raises those limits of the kernel that are lower than a node needs, and
// lowers none. Where it may not, the limits stay as they are, and preflight says so.
func RaiseLimits(log *slog.Logger) {
	for path, least := range leastLimits {
		text, err := os.ReadFile(path)
		if err != nil {
			continue // preflight has the sentence for it
		}
		have, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64)
		if err != nil || have >= least {
			continue
		}
		if err := os.WriteFile(path, []byte(strconv.FormatUint(least, 10)), 0); err != nil {
			log.Debug("a limit of the kernel stays as it is", "path", path, "err", err)
			continue
		}
		log.Info("raised a limit of the kernel", "path", path, "from", have, "to", least)
	}
}

// cgroupPath is where the node's cgroup is in a hierarchy.
func (c Config) cgroupPath() string {
	if c.SystemdCgroups {
		return "/" + cgroup.Slice(c.CgroupRoot)
	}
	return c.CgroupRoot
}

// Cleanup ends processes of pods that the runtime has lost track of, detaches the
// volumes that the kubelet has mounted and removes the pods' cgroups. The runtime
// must have ended its containers. What is stored in volumes stays.
//
// Of the folder for device plugins, which another node of this machine may use, it
// removes the kubelet's socket if no kubelet listens on it.
func Cleanup(ctx context.Context, cfg Config) error {
	errs := []error{cgroup.End(cfg.cgroupPath()), mounts.DetachBelow(cfg.kubeletDir()), stalesocket.Remove(pluginapi.KubeletSocket)}
	if cfg.SystemdCgroups {
		errs = append(errs, cgroup.RemoveSlice(ctx, cfg.CgroupRoot))
	} else {
		errs = append(errs, cgroup.Remove(cfg.CgroupRoot))
	}
	return errors.Join(errs...)
}
