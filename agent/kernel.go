package agent

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"strconv"
	"strings"

	pluginapi "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"

	"kedge/agent/hostpaths"
	"kedge/internal/cgroup"
	"kedge/internal/mounts"
	"kedge/internal/unixsocket"
)

// Prepare creates the cgroup of the node's pods, and claims the cgroup and the kubelet's folders for this
// process. It is called once, before other parts create kernel objects with the node's name; release gives up
// the claims.
func Prepare(ctx context.Context, cfg Config) (release func() error, err error) {
	if cfg.SystemdCgroups {
		err = cgroup.EnsureSlice(ctx, cfg.CgroupRoot)
	} else {
		err = cgroup.Ensure(cfg.CgroupRoot)
	}
	if err != nil {
		return nil, err
	}
	leavePlaces, err := hostpaths.Claim(cfg.places(), cfg.otherPlaces(), cfg.HostPaths)
	if err != nil {
		return nil, err
	}
	leaveGroup, err := cgroup.Claim(cfg.cgroupPath())
	if err != nil {
		return nil, errors.Join(err, leavePlaces())
	}
	return func() error { return errors.Join(leaveGroup(), leavePlaces()) }, nil
}

// minLimits are the minimum kernel limits for a full node: with the kernel's defaults, programs in pods fail
// with "too many open files" from a few dozen pods on, and a second node on the same machine does not start.
var minLimits = map[string]uint64{
	"/proc/sys/fs/inotify/max_user_instances": 8192,
	"/proc/sys/fs/inotify/max_user_watches":   524288,
}

// RaiseLimits raises the kernel limits that are lower than a node needs. If it has no permission, the limits
// stay as they are, and preflight reports them.
func RaiseLimits(log *slog.Logger) {
	for path, minimum := range minLimits {
		text, err := os.ReadFile(path)
		if err != nil {
			continue // preflight reports it
		}
		have, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64)
		if err != nil || have >= minimum {
			continue
		}
		if err := os.WriteFile(path, []byte(strconv.FormatUint(minimum, 10)), 0); err != nil {
			log.Debug("a kernel limit could not be raised", "path", path, "err", err)
			continue
		}
		log.Info("raised a kernel limit", "path", path, "from", have, "to", minimum)
	}
}

// cgroupPath returns the path of the node's cgroup in a hierarchy.
func (c Config) cgroupPath() string {
	if c.SystemdCgroups {
		return "/" + cgroup.Slice(c.CgroupRoot)
	}
	return c.CgroupRoot
}

// Cleanup kills processes of pods that the runtime has lost track of, detaches the volumes that the kubelet has
// mounted and removes the pods' cgroups. The runtime must have stopped its containers before. The data in
// volumes is kept.
//
// In the folder for device plugins, which another node of this machine may use, it only removes the kubelet's
// socket, and only if no kubelet listens on it.
func Cleanup(ctx context.Context, cfg Config) error {
	errs := []error{cgroup.End(cfg.cgroupPath()), mounts.DetachBelow(cfg.kubeletDir()), unixsocket.RemoveStale(pluginapi.KubeletSocket)}
	if cfg.SystemdCgroups {
		errs = append(errs, cgroup.RemoveSlice(ctx, cfg.CgroupRoot))
	} else {
		errs = append(errs, cgroup.Remove(cfg.CgroupRoot))
	}
	return errors.Join(errs...)
}
