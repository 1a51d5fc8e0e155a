package agent

import (
	"os"
	"strings"

	kubecontainer "k8s.io/kubernetes/pkg/kubelet/container"
)

// containedOS is the kubelet's view of the file system. It moves the folder with the links to container logs,
// whose path is fixed upstream, below the data directory.
type containedOS struct {
	kubecontainer.RealOS
	logLinks string // instead of /var/log/containers
}

const upstreamLogLinks = "/var/log/containers"

func (o containedOS) path(p string) string {
	if rest, ok := strings.CutPrefix(p, upstreamLogLinks); ok {
		return o.logLinks + rest
	}
	return p
}

func (o containedOS) MkdirAll(p string, perm os.FileMode) error { return os.MkdirAll(o.path(p), perm) }

func (o containedOS) Symlink(from, to string) error { return os.Symlink(from, o.path(to)) }

func (o containedOS) Stat(p string) (os.FileInfo, error) { return os.Stat(o.path(p)) }

func (o containedOS) Remove(p string) error { return os.Remove(o.path(p)) }

func (o containedOS) RemoveAll(p string) error { return os.RemoveAll(o.path(p)) }

func (o containedOS) Chmod(p string, perm os.FileMode) error { return os.Chmod(o.path(p), perm) }

func (o containedOS) ReadDir(p string) ([]os.DirEntry, error) { return os.ReadDir(o.path(p)) }

func (o containedOS) Glob(pattern string) ([]string, error) {
	return o.RealOS.Glob(o.path(pattern))
}

func (o containedOS) Open(p string) (*os.File, error) { return os.Open(o.path(p)) }

func (o containedOS) Rename(from, to string) error { return os.Rename(o.path(from), o.path(to)) }
