package throwaway

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/clientcmd/api"
)

// writeKubeconfig makes the cluster's own file of the one that its first server has
// written: with the server's address on the switch, and with the names of the cluster.
func (c *Cluster) writeKubeconfig() error {
	first := c.site.Machines()[0]
	made, err := clientcmd.LoadFromFile(first.Disk(adminKubeconfig))
	if err != nil {
		return err
	}
	current := made.Contexts[made.CurrentContext]
	if current == nil {
		return fmt.Errorf("%s has no current context", first.Disk(adminKubeconfig))
	}
	cluster, user := made.Clusters[current.Cluster], made.AuthInfos[current.AuthInfo]
	if cluster == nil || user == nil {
		return fmt.Errorf("%s is not whole", first.Disk(adminKubeconfig))
	}
	cluster.Server = fmt.Sprintf("https://%s:6443", first.Addrs()[0].Addr())
	name := c.Context()
	own := api.NewConfig()
	own.Clusters[name], own.AuthInfos[name] = cluster, user
	own.Contexts[name] = &api.Context{Cluster: name, AuthInfo: name}
	own.CurrentContext = name
	return clientcmd.WriteToFile(*own, c.Kubeconfig())
}

// Config is for a client of the cluster with all rights.
func (c *Cluster) Config() (*rest.Config, error) {
	config, err := clientcmd.BuildConfigFromFlags("", c.Kubeconfig())
	if err == nil {
		config.QPS = -1
	}
	return config, err
}

// addContext merges the cluster's context into a file of the user's and makes it the
// current one. Nothing else in the file changes.
func (c *Cluster) addContext(path string) error {
	own, err := clientcmd.LoadFromFile(c.Kubeconfig())
	if err != nil {
		return err
	}
	return changeKubeconfig(path, func(all *api.Config) bool {
		name := c.Context()
		all.Clusters[name], all.AuthInfos[name], all.Contexts[name] = own.Clusters[name], own.AuthInfos[name], own.Contexts[name]
		all.CurrentContext = name
		return true
	})
}

// dropContext undoes addContext. A file that is gone needs no change.
func dropContext(path, name string) error {
	return changeKubeconfig(path, func(all *api.Config) bool {
		if all.Contexts[name] == nil && all.Clusters[name] == nil && all.AuthInfos[name] == nil {
			return false
		}
		delete(all.Clusters, name)
		delete(all.AuthInfos, name)
		delete(all.Contexts, name)
		if all.CurrentContext == name {
			all.CurrentContext = ""
		}
		return true
	})
}

// changeKubeconfig changes a file that kubectl and others may change too: under the
// lock that they use.
func changeKubeconfig(path string, change func(*api.Config) (changed bool)) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("kubeconfig: %w", err)
	}
	// A lock of the kernel's on a file of its own beside kubectl's convention of a file
	// that exists: one that is killed leaves no lock.
	lock, err := os.OpenFile(filepath.Dir(path), unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("kubeconfig: %w", err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("kubeconfig: lock %s: %w", filepath.Dir(path), err)
	}
	all, err := clientcmd.LoadFromFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		all, err = api.NewConfig(), nil
	}
	if err != nil {
		return fmt.Errorf("kubeconfig %s: %w", path, err)
	}
	if !change(all) {
		return nil
	}
	// Written beside it and renamed, so that nobody sees half of it.
	tmp := path + ".kedge"
	if err := clientcmd.WriteToFile(*all, tmp); err != nil {
		return fmt.Errorf("kubeconfig: %w", err)
	}
	if err := os.Rename(tmp, path); err != nil {
		return errors.Join(fmt.Errorf("kubeconfig: %w", err), os.Remove(tmp))
	}
	return nil
}
