// Package kubeconfig merges the context of a cluster into a kubeconfig of the user, and removes it: under the lock that
// kubectl takes too, with the owner, the mode and the symbolic links of the file kept. It creates no credentials and
// talks to no cluster. Packages throwaway and command may import it.
package kubeconfig

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/clientcmd/api"

	"kedge/internal/atomicfile"
)

// Add merges the current context of the kubeconfig at from into the one at path, with name as the name of cluster, user and
// context, and makes it the current context. Nothing else in the file changes.
func Add(path, from, name string) error {
	made, err := clientcmd.LoadFromFile(from)
	if err != nil {
		return err
	}
	current := made.Contexts[made.CurrentContext]
	if current == nil {
		return fmt.Errorf("%s has no current context", from)
	}
	cluster, user := made.Clusters[current.Cluster], made.AuthInfos[current.AuthInfo]
	if cluster == nil || user == nil {
		return fmt.Errorf("%s lacks the cluster or the user of its current context", from)
	}
	return change(path, func(all *api.Config) bool {
		all.Clusters[name], all.AuthInfos[name], all.Contexts[name] = cluster, user, &api.Context{Cluster: name, AuthInfo: name}
		all.CurrentContext = name
		return true
	})
}

// Drop undoes Add. A missing file needs no change, nor does a device, which Add refuses.
func Drop(path, name string) error {
	if st, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) || err == nil && !st.Mode().IsRegular() {
		return nil
	}
	return change(path, func(all *api.Config) bool {
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

// change changes a file that kubectl and others may change too. It keeps the file's
// owner, since under sudo the file belongs to another user, and follows a symbolic link.
func change(path string, edit func(*api.Config) (changed bool)) error {
	owner, err := ownerOf(path)
	if err != nil {
		return fmt.Errorf("kubeconfig: %w", err)
	}
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real
	}
	if err := atomicfile.Replaceable(path); err != nil { // KUBECONFIG=/dev/null
		return fmt.Errorf("kubeconfig: %w", err)
	}
	if err := owner.mkdirAll(filepath.Dir(path)); err != nil {
		return fmt.Errorf("kubeconfig: %w", err)
	}
	unlock, err := lockKubeconfig(path)
	if err != nil {
		return fmt.Errorf("kubeconfig: %w", err)
	}
	defer unlock()
	all, err := clientcmd.LoadFromFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		all, err = api.NewConfig(), nil
	}
	if err != nil {
		return fmt.Errorf("kubeconfig %s: %w", path, err)
	}
	if !edit(all) {
		return nil
	}
	// Written beside it and renamed, so that no reader sees half of it.
	tmp := path + ".kedge"
	if err := clientcmd.WriteToFile(*all, tmp); err != nil {
		return fmt.Errorf("kubeconfig: %w", err)
	}
	err = os.Lchown(tmp, owner.uid, owner.gid)
	if st, none := os.Stat(path); err == nil && none == nil {
		err = os.Chmod(tmp, st.Mode().Perm())
	}
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("kubeconfig: %w", err), os.Remove(tmp))
	}
	return nil
}

// owner is the owner of a file or, if it does not exist yet, of the folder that it will be in.
type owner struct{ uid, gid int }

func ownerOf(path string) (owner, error) {
	for {
		st, err := os.Stat(path)
		if err == nil {
			sys := st.Sys().(*syscall.Stat_t)
			return owner{int(sys.Uid), int(sys.Gid)}, nil
		}
		if !errors.Is(err, fs.ErrNotExist) || path == filepath.Dir(path) {
			return owner{}, err
		}
		path = filepath.Dir(path)
	}
}

// mkdirAll makes a folder and its missing parents.
func (o owner) mkdirAll(dir string) error {
	if _, err := os.Stat(dir); err == nil || dir == filepath.Dir(dir) {
		return err
	}
	if err := o.mkdirAll(filepath.Dir(dir)); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return os.Lchown(dir, o.uid, o.gid)
}

// Times of the lock that kubectl takes too.
const (
	lockRetry = 20 * time.Millisecond
	lockWait  = 5 * time.Second // kubectl holds it for milliseconds
)

// lockKubeconfig locks a file as kubectl does (client-go's clientcmd): by making a file beside
// it that must not exist yet. Before that it takes a flock, on which kedge's own processes
// wait for each other.
func lockKubeconfig(path string) (unlock func(), err error) {
	dir, err := os.OpenFile(filepath.Dir(path), unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX); err != nil {
		dir.Close()
		return nil, fmt.Errorf("lock %s: %w", dir.Name(), err)
	}
	name := path + ".lock"
	for begin := time.Now(); ; time.Sleep(lockRetry) {
		f, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL, 0)
		if err == nil {
			f.Close()
			return func() { os.Remove(name); dir.Close() }, nil
		}
		if !errors.Is(err, fs.ErrExist) || time.Since(begin) > lockWait {
			dir.Close()
			return nil, fmt.Errorf("%w: another program is changing the file; remove %s if there is no such program", err, name)
		}
	}
}
